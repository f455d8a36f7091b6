"""Cost of adding views with `precompute run`, in stores with few and with many views."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from _harness import ratios, row
from safetensors.torch import save_file

from coursepack.data import PRESETS, open_source
from coursepack.data.store import StoreWriter
from coursepack.models import TeacherRunner, build_network, load_teacher, parse_tap
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from pathlib import Path

FEW = 1
"""Number of views of the store that the others are compared with."""
BLOCK_ROWS = 200


@dataclass(frozen=True)
class GrowthSize:
    """Sizes of the stores and number of added views."""

    many: tuple[int, ...] = (200, 1000)
    more: int = 10
    rounds: int = 25


FULL_GROWTH = GrowthSize()
QUICK_GROWTH = GrowthSize(many=(3,), more=1, rounds=2)


def view_growth(folder: Path, size: GrowthSize) -> list[dict[str, Any]]:
    """Measure the CPU time of `more` views of the digits, and its ratio to that in a store of one view.

    Every round adds the views to each store in random order and then removes them from its manifest, so that
    the next one writes them again. Time spent waiting for the disk is not included.
    """
    folder.mkdir()
    job = _job(folder)
    paths = {views: folder / f"{views}.zarr" for views in (FEW, *size.many)}
    for views, path in paths.items():
        _fill(replace(job, store=path, views=views))
    seconds: dict[str, list[float]] = {str(views): [] for views in paths}
    order = random.Random(0)
    for round_number in range(size.rounds + 1):
        for views in order.sample(list(paths), len(paths)):
            more = replace(job, store=paths[views], views=views + size.more)
            started = time.process_time()
            run_job(more, quiet=True)
            if round_number:
                seconds[str(views)].append(time.process_time() - started)
            with StoreWriter(more.store, more.plan()) as writer:
                writer.forget(range(views, more.views))
    config = {
        "samples": len(job.source.labels),
        "views added": size.more,
        "block rows": BLOCK_ROWS,
        "taps": 1,
    }
    rows = [
        row(
            f"CPU of a view more on {views}",
            [1000 * s / size.more for s in seconds[str(views)]],
            "ms",
            config,
        )
        for views in paths
    ]
    return rows + [
        row(
            f"CPU of a view more, on {views} / on {FEW}",
            ratios(seconds, str(views), str(FEW)),
            "ratio",
            config,
            "<= 1.2",
        )
        for views in size.many
    ]


def _job(folder: Path) -> Job:
    """Return a job of a small untrained network on the digits, with one tap."""
    source = open_source("digits")
    built = build_network("digits-mlp", len(source.class_names), seed=0)
    save_file(built.module.state_dict(), folder / "teacher.safetensors")
    network = load_teacher("digits-mlp", source.class_names, weights=str(folder / "teacher.safetensors"))
    runner = TeacherRunner(network, [parse_tap("hidden2")])
    return Job(folder, source, PRESETS["digits"], runner, views=1, block_rows=BLOCK_ROWS)


def _fill(job: Job) -> None:
    """Write a store of random rows that the job can extend, without durability across power loss."""
    rng = np.random.default_rng(0)
    record = {"draws": "00000000", "environment": job.environment()}
    sums = {"correct": 0.0, "cross_entropy": 0.0, "entropy": 0.0}
    with mock.patch.object(os, "fsync"), StoreWriter(job.store, job.plan()) as writer:
        shapes = {name: array.row_shape for name, array in writer.manifest.arrays.items()}
        values = {name: rng.normal(size=(BLOCK_ROWS, *shape)) for name, shape in shapes.items()}
        for block in writer.pending():
            files = writer.write(block, record)
            files.add({name: rows[: len(block)].astype(np.float32) for name, rows in values.items()})
            files.finish({"rows": float(len(block)), **sums})
            if writer.is_complete(block.view):
                writer.commit()
