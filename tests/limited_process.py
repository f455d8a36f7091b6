"""A store's life in a process that may hold far less than the store: the limit cannot be taken back.

    python limited_process.py FOLDER '{"samples": 17000, "views": 2, "steps": ["write", "train"], ...}'

Prints JSON: for each step how many bytes of anonymous memory there were at most, beyond those before the
first; and whether a whole view in memory was refused.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from builders import make_recipe
from helpers import RowStore, write_rows

from coursepack.canonical import fingerprint
from coursepack.data import epoch_order
from coursepack.data.batches import Window
from coursepack.data.sources import SOURCES, SourceKind
from coursepack.data.store import StoreReader, verify
from coursepack.data.views import draw, view_fingerprint
from coursepack.distill.runs.folder import PROVENANCE_FILE
from coursepack.distill.runs.train import train

WIDTH = 1000
FEW = 600
PIXELS = {"size": 8, "mean": [0.5], "std": [0.5]}
"""Samples of the store that everything is tried on before the limit is set."""


@dataclass(frozen=True)
class Numbers:
    """A source of as many samples as wanted, whose pixels take no memory."""

    name: str
    labels: np.ndarray
    class_names: tuple[str, ...] = tuple(map(str, range(WIDTH)))
    channels: int = 1
    in_memory: None = None

    @property
    def fingerprint(self) -> str:
        """Of name and length."""
        return fingerprint({"name": self.name, "samples": len(self.labels)})

    def sizes(self, samples):
        """All of 8 x 8 pixels."""
        return np.full((len(samples), 2), 8, dtype=np.int32)

    def check(self):
        """Nothing on disk."""

    def pixels(self, samples):
        """A sample's number, spread over 64 pixels."""
        return (samples[:, None] * np.arange(1, 65) % 251).astype(np.uint8).reshape(-1, 8, 8, 1)


def numbers(split, samples):
    return Numbers(f"numbers:{split}", np.arange(samples) % WIDTH)


@dataclass(frozen=True)
class WideStore(RowStore):
    """Logits a hundred times wider than the pixels, made when they are written."""

    source: Numbers | None = None

    @property
    def labels(self):
        """The source's."""
        return self.source.labels

    def plan(self, **changes):
        """With the source's identity, as training wants it."""
        recipe = self.view_recipe.model_dump(mode="json")
        identity = {
            "teacher": {"network": "made up", "weights": "", "preprocessing": PIXELS},
            "view": {"recipe": recipe, "fingerprint": view_fingerprint(self.view_recipe, self.source)},
            "source": {"name": self.source.name, "fingerprint": self.source.fingerprint},
        }
        return super().plan(identity=identity, class_names=self.source.class_names, **changes)

    def rows(self, view, samples):
        """Logits of some samples."""
        return ((samples[:, None] * 7 + np.arange(WIDTH) + view) % 97 / 8).astype(np.float32)

    def write_block(self, writer, block, *, batch_size=250):
        """Write one block in batches."""
        draws = draw(self.view_recipe, self.source, block.samples, block.view).digest()
        files = writer.write(block, {"draws": draws, "environment": {}})
        for start in range(0, len(block), batch_size):
            files.add({"logits": self.rows(block.view, block.samples[start : start + batch_size])})
        files.finish({"rows": float(len(block))})


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def watching(start):
    """Find the largest anonymous memory while the block runs, beyond `start` bytes."""
    found, over = [0], threading.Event()

    def watch():
        while not over.wait(0.002):
            found[0] = max(found[0], status("RssAnon") - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def write(path, store, reading):
    write_rows(path, store)


def check(path, store, reading):
    assert verify(path).problems == ()


def read(path, store, reading):
    reader = StoreReader(path, reading)
    window = Window(reader.chunk_rows(["logits"]), 16)
    for view in range(store.views):
        order = epoch_order(np.arange(store.samples), seed=0, epoch=view, window=window)
        for start in range(0, store.samples, 256):
            chosen = order[start : start + 256]
            found = reader.components("logits", view, chosen)["values"]
            assert np.array_equal(found, store.rows(view, chosen))


def learn(path, store, reading):
    split = store.source.name.partition(":")[2]
    facts = {"source": store.source.name, "evaluation": "numbers:test", "reading": reading}
    recipe = make_recipe([path], batch_size=256, epochs=store.views, **facts)
    folder = path.with_name(f"run-{split}-{reading}")
    metrics = train(recipe, folder, device=torch.device("cpu"), workers=0)
    assert metrics["view"] == store.views - 1
    told = json.loads((folder / PROVENANCE_FILE).read_text())["stores"][0]["reading"]
    assert split == "few" or told == (reading if reading != "auto" else "windowed")


STEPS = {"write": write, "verify": check, "read": read, "train": learn}


def main():
    folder, facts = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    lengths = {"few": FEW, "train": facts["samples"], "test": 100}
    SOURCES["numbers"] = SourceKind(
        lambda spec, _: numbers(spec.split, lengths[spec.split]),
        splits=tuple(lengths),
        evaluation_split="test",
    )
    few, store = (
        WideStore(
            samples=lengths[split],
            views=facts["views"],
            block_rows=facts["block_rows"],
            shapes={"logits": (WIDTH,)},
            source=numbers(split, lengths[split]),
        )
        for split in ("few", "train")
    )
    write(folder / "few.zarr", few, "")
    for reading in facts["readings"]:
        for name in facts["steps"]:
            if name != "write":
                STEPS[name](folder / "few.zarr", few, reading)
    start = status("RssAnon")
    threading.stack_size(1 << 20)  # the limit counts whole stacks, 8 MB by default, used or not
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + facts["limit"],) * 2)
    path, grown = folder / "s.zarr", {}
    for name in facts["steps"]:
        for reading in facts["readings"] if name in ("read", "train") else [""]:
            with watching(start) as found:
                STEPS[name](path, store, reading)
            grown[f"{name} {reading}".strip()] = found[0]
    try:
        StoreReader(path, "resident").components("logits", 0, np.arange(1))
        refused = False
    except MemoryError:
        refused = True
    print(json.dumps({"grown": grown, "refused": refused}))


if __name__ == "__main__":
    main()
