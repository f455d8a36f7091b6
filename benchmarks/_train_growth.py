"""Growth of epoch time with samples, teachers, views and classes, and the start-up time of a run."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _harness import alternate, row

from coursepack.data import open_source, view_fingerprint, view_recipe
from coursepack.data.drift import content_digest, probe_digests, probe_samples
from coursepack.data.encodings import parse_encoding
from coursepack.data.store import StorePlan, StoreWriter
from coursepack.data.store.layout import block_count
from coursepack.data.store.manifest import LOGITS
from coursepack.data.views import draw
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coursepack.data import Source

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STUDENT = "resnet8"


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    samples: int = 1024
    factors: tuple[int, ...] = (1, 4, 16)
    teachers: tuple[int, ...] = (1, 2, 4, 8)
    views: tuple[int, ...] = (1, 4, 16)
    classes: tuple[int, ...] = (10, 100, 1000)
    rounds: int = 6
    large: tuple[int, int] = (1_000_000, 64)
    """Samples and views of the store for the start-up time."""


FULL = Size()
QUICK = Size(16, (1, 2), (1, 2), (1,), (10,), rounds=1, large=(1000, 4))


def growth(folder: Path, size: Size) -> list[dict[str, Any]]:
    """Measure epochs in microseconds per sample, with one quantity growing at a time."""
    folder.mkdir()
    base = {"N": size.samples, "K": 1, "V": 1, "C": 100}
    cells = [
        *({**base, "N": size.samples * factor} for factor in size.factors),
        *({**base, "K": count} for count in size.teachers),
        *({**base, "V": count} for count in size.views),
        *({**base, "C": count} for count in size.classes),
    ]
    runs = {}
    for cell in cells:
        name = ", ".join(f"{key}={value}" for key, value in cell.items())
        if name not in runs:
            runs[name] = (cell, _epochs(folder, cell))
    seconds = alternate({name: run for name, (_, run) in runs.items()}, size.rounds)
    return [
        row(f"growth: {name}", [1e6 * s / cell["N"] for s in seconds[name]], "us per sample", cell)
        for name, (cell, _) in runs.items()
    ]


def _epochs(folder: Path, cell: dict[str, int]) -> Any:
    """Return a function that trains one more epoch."""
    spec = f"fake,classes={cell['C']},size=32,channels=3,samples={cell['N']}"
    source, name = open_source(spec), "-".join(map(str, cell.values()))
    stores = [
        write_store(folder / f"{name}-{place}.zarr", source, "cifar", cell["V"], place)
        for place in range(cell["K"])
    ]
    run = prepare(recipe(spec, "cifar", stores, STUDENT), DEVICE)
    state, epochs = make_state(run), itertools.count()

    def one() -> None:
        epoch = next(epochs)
        train_epoch([state], run.batches(epoch), run.targets, epoch)

    return one


def beginning(folder: Path, size: Size) -> list[dict[str, Any]]:
    """Measure the time from a recipe to the end of the first step, on a large store with an open source."""
    folder.mkdir()
    samples, views = size.large
    source = f"fake,classes=2,size=8,channels=1,samples={samples}"
    store = write_store(folder / "large.zarr", open_source(source), "none", views, 0)
    chosen = recipe(source, "none", [store], "digits-small")
    seconds = []
    for _ in range(size.rounds):
        started = time.perf_counter()
        open_source(chosen.source)
        open_source(chosen.evaluation)
        opened = time.perf_counter()
        run = prepare(chosen, DEVICE)
        train_epoch([make_state(run)], itertools.islice(run.batches(0), 1), run.targets)
        seconds.append(time.perf_counter() - opened - (opened - started))
    config = {
        "samples": samples,
        "views": views,
        "bytes": sum(f.stat().st_size for f in store.rglob("*") if f.is_file()),
    }
    return [row("start-up to the end of the first step", seconds, "s", config, "<= 2")]


def recipe(source: str, view: str, stores: Sequence[Path | str], student: str) -> TrainRecipe:
    """Return a recipe for `kd` on a synthetic source."""
    opened = open_source(source)
    return TrainRecipe.model_validate(
        {
            "student": student, "method": "kd", "objective": resolve_objective("kd", {}, "benchmark"),
            "stores": [str(store) for store in stores], "source": opened.name,
            "evaluation": opened.name, "view": view_recipe(view), "batch_size": 64,
        }
    )  # fmt: skip


def write_store(
    path: Path, source: Source, view: str, views: int, seed: int, encoding: str = "float16"
) -> Path:
    """Write a store of random logits; only the block that is checked first has a view digest."""
    drawn = view_recipe(view)
    size = next(iter(source.sizes(np.arange(1))))[0].item()
    pixels = {"size": size, "mean": [0.5] * source.channels, "std": [0.5] * source.channels}
    plan = StorePlan(
        identity={
            "teacher": {"network": "noise", "weights": str(seed), "preprocessing": pixels},
            "view": {"recipe": drawn.model_dump(mode="json"), "fingerprint": view_fingerprint(drawn, source)},
            "source": {"name": source.name, "fingerprint": source.fingerprint},
            "precision": "float32",
        },
        origin={},
        labels=source.labels,
        class_names=source.class_names,
        views=views,
        arrays={LOGITS: (parse_encoding(encoding), (len(source.class_names),))},
    )
    rng = np.random.default_rng(seed)
    logits: Any = None
    with StoreWriter(path, plan) as writer:
        for block in writer.pending():
            if logits is None:
                logits = rng.normal(scale=3, size=(len(block), len(source.class_names))).astype(np.float32)
                blocks = block_count(len(source.labels), len(block))
            probed = probe_samples(len(source.labels), block.view)
            probed = probed[(probed >= block.start) & (probed < block.stop)]
            params = draw(drawn, source, block.samples, block.view)
            is_looked_at = block.start // len(logits) == block.view % blocks
            record: dict[str, Any] = {
                "draws": params.digest() if is_looked_at else "",
                "probes": probe_digests(drawn, source, probed, params[probed - block.start], size),
                "environment": {},
            }
            if block.view == 0:
                record["content"] = content_digest(source, block.samples)
            files = writer.write(block, record)
            files.add({LOGITS: logits[: len(block)]})
            files.finish({"rows": float(len(block)), "correct": 0.0})
        writer.commit()
    return path
