"""Jobs of tiny teachers, stores of random rows, sources of random images, and what a store is on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.canonical import canonical_json, fingerprint
from coursepack.data import PRESETS, ViewRecipe, open_source
from coursepack.data.encodings import parse_encoding
from coursepack.data.sources import InMemory
from coursepack.data.store import StorePlan, StoreWriter
from coursepack.data.store.contents import digest_of, list_key, view_of
from coursepack.data.store.locations import open_location
from coursepack.models import TeacherRunner, load_teacher
from coursepack.precompute import Job

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.data.store.owners import Part


def store_files(path: Path) -> dict[str, bytes]:
    """Every file of a store by its place in it, except the records under `runs/`."""
    files = (file for file in path.rglob("*") if file.is_file())
    places = {file.relative_to(path).as_posix(): file for file in files}
    return {place: file.read_bytes() for place, file in places.items() if not place.startswith("runs/")}


def file_identities(path: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every data file of a store: both change when it is written again."""
    found = ((file.relative_to(path).as_posix(), file.stat()) for file in path.rglob("c.*") if file.is_file())
    return {place: (stat.st_ino, stat.st_mtime_ns) for place, stat in found}


def make_job(store: Path, teacher: Path, *, source=None, taps=(), **fields: Any) -> Job:
    """What `precompute run` would do with a teacher's run folder and the view preset `digits`."""
    source = source or open_source("digits")
    runner = TeacherRunner(load_teacher(f"run:{teacher}", source.class_names), taps)
    facts = {"store": store, "source": source, "recipe": PRESETS["digits"], "runner": runner, "views": 2}
    return Job(**facts | fields)


def random_source(samples: int, *, size: int = 8, channels: int = 1, classes: int = 10, seed: int = 0):
    """A source of random pixels and labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (samples, size, size, channels), dtype=np.uint8)
    names = tuple(f"class {label}" for label in range(classes))
    return InMemory("random:train", images, rng.integers(0, classes, samples), names)


def rewrite_manifest(path, change):
    """Change the manifest's values, with those of its lists, and give it the right checksum again."""
    values = json.loads((path / "manifest.json").read_text())
    del values["checksum"]
    lists = values.pop("view_lists", None)
    if lists is not None:
        _take_in(path, values, lists)
    change(values)
    if lists is not None:
        _give_out(path, values)
    values["checksum"] = fingerprint(values)
    (path / "manifest.json").write_text(canonical_json(values, indent=1))


def _take_in(path, values, lists):
    """Have `files`, `view_records` and `committed` as in version 1, where all of it is in the manifest."""
    values["view_records"] = {}
    for view, digest in lists.items():
        entry = json.loads((path / list_key(int(view), digest)).read_bytes())
        values["files"] |= entry["files"]
        values["view_records"][view] = entry["record"]
    for name, ranges in values["committed"].items():
        values["committed"][name] = [view for start, stop in ranges for view in range(start, stop)]


def _give_out(path, values):
    """Write the lists of views for what `_take_in` put together, and have the manifest name them."""
    files, records = values.get("files", {}), values.pop("view_records", {})
    entries = {view: {"files": {}, "record": record} for view, record in records.items()}
    for key in [key for key in files if not key.startswith(("labels/", "static/"))]:
        entry = entries.setdefault(str(view_of(key)), {"files": {}})
        entry["files"][key] = files.pop(key)
    values["view_lists"] = {}
    for view, entry in entries.items():
        text = canonical_json(entry).encode()
        values["view_lists"][view] = digest_of(text)
        (path / list_key(int(view), digest_of(text))).write_bytes(text)
    for name, views in values.get("committed", {}).items():
        values["committed"][name] = [[view, view + 1] for view in views]
    sums = [record["sums"] for record in records.values() if isinstance(record["sums"], dict)]
    values["totals"] = {
        name: float(sum(each[name] for each in sums if isinstance(each.get(name), float)))
        for name in ("rows", "correct")
    }
    environments = {
        canonical_json(each): each for record in records.values() for each in record["environments"]
    }
    values["environments"] = [environments[text] for text in sorted(environments)]


@dataclass(frozen=True)
class RowStore:
    """What `write_rows` puts into a store, and what a reader has to give back."""

    samples: int = 50
    views: int = 2
    block_rows: int | None = 16
    encoding: str = "float32"
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"logits": (10,)})
    view_recipe: ViewRecipe = PRESETS["digits"]
    seed: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    format_version: int = 2

    @property
    def labels(self) -> np.ndarray:
        """Labels `(N,)`."""
        return np.random.default_rng([self.seed, 1]).integers(0, 10, self.samples)

    def values(self, array: str, view: int) -> np.ndarray:
        """Rows `(N, ...)` float32 of one array and view, the same whatever else the store holds."""
        rng = np.random.default_rng([self.seed, 2, view, *array.encode()])
        return rng.normal(0, 5, (self.samples, *self.shapes[array])).astype(np.float32)

    def encoding_of(self, array: str) -> Any:
        """The encoding of one array."""
        return parse_encoding(self.encoding)

    def parts(self, array: str, view: int) -> dict[str, np.ndarray]:
        """What is stored of one array and view: all rows of every component."""
        rows = np.arange(self.samples)
        return self.encoding_of(array).encode(self.values(array, view), rows, self.labels)

    def stored(self, array: str, view: int) -> np.ndarray:
        """The same rows in the dtype of the encoding, where that is a dense one."""
        return self.parts(array, view)["values"]

    def decoded(self, array: str, view: int) -> np.ndarray:
        """What a reader should decode: rows `(N, ...)` float32, at a temperature of 1."""
        tensors = {name: torch.from_numpy(part) for name, part in self.parts(array, view).items()}
        return self.encoding_of(array).rows(tensors, self.shapes[array]).decode().numpy()

    def plan(self, **changes: Any) -> StorePlan:
        """The plan of such a store."""
        facts = {
            "identity": {"view": {"recipe": self.view_recipe.model_dump(mode="json"), "fingerprint": "0"}},
            "origin": {},
            "labels": self.labels,
            "class_names": tuple("abcdefghij"),
            "views": self.views,
            "arrays": {name: (self.encoding_of(name), shape) for name, shape in self.shapes.items()},
            "block_rows": self.block_rows,
            "format_version": self.format_version,
        }
        return StorePlan(**facts | changes)

    def write_block(self, writer: StoreWriter, block: Any, *, batch_size: int = 7) -> None:
        """Write one block in batches."""
        draws = f"{block.view:04x}{block.start:04x}"
        files = writer.write(block, {"draws": draws, "environment": self.environment})
        rows = {name: self.values(name, block.view)[block.samples] for name in self.shapes}
        for start in range(0, len(block), batch_size):
            files.add({name: values[start : start + batch_size] for name, values in rows.items()})
        files.finish({"rows": float(len(block))})


def write_rows(path: Path, rows: RowStore | None = None, part: Part | None = None) -> RowStore:
    """Write a committed store of random rows; returns what it holds."""
    rows = rows or RowStore()
    with StoreWriter(path, rows.plan(), part) as writer:
        for block in writer.pending():
            rows.write_block(writer, block)
        writer.commit()
    return rows


def copy_to(home, store):
    """Copy a local store into the bucket at an address, and return its address there."""
    address = f"{home}/{store.name}"
    location = open_location(address)
    for path in store.rglob("*"):
        if path.is_file():
            location.put(path.relative_to(store).as_posix(), path.read_bytes())
    return address
