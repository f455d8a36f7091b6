"""Estimates of a store's cost before it is written: bytes, files, time and break-even."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.console import byte_size
from coursepack.data.store import StoreReader, StoreWriter
from coursepack.data.store.layout import block_count, table_key
from coursepack.data.store.shards import rows_size, shard_size
from coursepack.data.views import draw, render
from coursepack.errors import StoreFull
from coursepack.precompute.job import run_job, with_limit

if TYPE_CHECKING:
    from coursepack.data.store.manifest import StoredArray
    from coursepack.precompute.job import Job

PROBE_BATCHES = 4
PROBE_READS = 20
POINTS_BELOW = {1: 4.4, 2: 1.2}
"""Points of accuracy by which students of so many views stay below those of a new view in every epoch, on the
digits by `kd` (benchmarks/results/views-students.json)."""
LEVEL_VIEWS = 4
"""Number of views from which on there is no such difference beyond chance."""


@dataclass(frozen=True)
class ArrayCost:
    """Size of one array of a store."""

    name: str
    encoding: str
    row_bytes: int
    total_bytes: int
    """Bytes of its shard files, including checksums, indices and the padding of each view's last chunk."""
    shards: int


@dataclass(frozen=True)
class Costs:
    """Size of a store, the part of it that is missing, and the free space."""

    rows: int
    """Number of rows (sample, view) in the whole store."""
    rows_left: int
    """Number of rows that are not written yet."""
    blocks: int
    block_rows: int
    arrays: tuple[ArrayCost, ...]
    table_bytes: int
    """Bytes of the files for labels and for values of the teacher."""
    table_files: int
    bytes_left: int
    """Bytes of all files that are not written yet."""
    free_bytes: int
    """Free bytes at the store's location."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files in the manifest. The manifest itself has a few kilobytes per view."""
        return self.table_bytes + sum(array.total_bytes for array in self.arrays)

    @property
    def files(self) -> int:
        """Number of files in the manifest."""
        return self.table_files + sum(array.shards for array in self.arrays)


@dataclass(frozen=True)
class Probe:
    """Measured times of a few batches, in seconds per image."""

    teacher: float
    """Time to render a view and run the teacher."""
    read: float
    """Time to read a row from a store."""

    def break_even(self, views: int) -> float:
        """Return the number of student epochs from which a store of V views is faster than live teachers."""
        saved = self.teacher - self.read
        return views * self.teacher / saved if saved > 0 else float("inf")


def costs(job: Job) -> Costs:
    """Count rows, bytes and files without writing anything; the teacher runs on a single image.

    Raises:
        StoreMismatch: the store exists and was written by another recipe.
    """
    writer = StoreWriter(job.store, job.plan(), job.part)
    manifest = writer.planned()
    left = writer.blocks_left()
    samples, views = manifest.samples, manifest.views
    arrays = [
        ArrayCost(
            name,
            array.encoding.name,
            array.row_bytes,
            views * _shard_bytes(array, samples),
            views * sum(layout.shard_count(samples) for layout in array.components.values()),
        )
        for name, array in manifest.arrays.items()
    ]
    tables = {
        table_key(name, table.layout): shard_size(table.rows, table.layout)
        for name, table in manifest.tables.items()
    }
    missing = [_shard_bytes(manifest.arrays[name], len(block)) for block in left for name in block.arrays]
    missing += [size for key, size in tables.items() if key not in manifest.files]
    return Costs(
        rows=samples * views,
        rows_left=sum(map(len, left)),
        blocks=views * block_count(samples, manifest.block_rows),
        block_rows=manifest.block_rows,
        arrays=tuple(arrays),
        table_bytes=sum(tables.values()),
        table_files=len(tables),
        bytes_left=sum(missing),
        free_bytes=writer.location.free_bytes(),
    )


def _shard_bytes(array: StoredArray, rows: int) -> int:
    """Return the size in bytes of the shard files for `rows` rows from the start of a block."""
    return sum(rows_size(rows, layout) for layout in array.components.values())


def check_space(job: Job) -> None:
    """Check that a job's store fits into the free space at its location.

    Raises:
        StoreFull: the store does not fit. The message has the needed and the free space.
    """
    cost = costs(job)
    if cost.bytes_left > cost.free_bytes:
        raise StoreFull(
            f"store {str(job.store)!r} needs {byte_size(cost.bytes_left)} more, but "
            f"{byte_size(cost.free_bytes)} are free there. Choose a smaller --encoding, fewer --views, "
            "another disk, or --ignore-space."
        )


def probe(job: Job) -> Probe:
    """Measure the teacher on a few batches, and reading its outputs from a small temporary store."""
    return Probe(teacher_seconds(job), read_seconds(job))


def teacher_seconds(job: Job) -> float:
    """Measure the time per image to render a view and run the teacher, on a few batches."""
    samples = _probed(job)
    size = job.runner.network.preprocessing.size
    _forward(job, samples[: job.batch_size], size)
    started = time.perf_counter()
    for start in range(0, len(samples), job.batch_size):
        _forward(job, samples[start : start + job.batch_size], size)
    return (time.perf_counter() - started) / len(samples)


def read_seconds(job: Job) -> float:
    """Measure the time per row to read the teacher's outputs from a small temporary store."""
    samples = _probed(job)
    with tempfile.TemporaryDirectory() as folder:
        small = with_limit(job, Path(folder) / "probe.zarr", len(samples))
        run_job(small, quiet=True)
        reader = StoreReader(small.store)
        order = np.random.default_rng(0).permutation(samples)[: job.batch_size]
        for array in reader.manifest.arrays:
            reader.rows(array, 0, order)
        started = time.perf_counter()
        for _ in range(PROBE_READS):
            for array in reader.manifest.arrays:
                reader.rows(array, 0, order)
        return (time.perf_counter() - started) / PROBE_READS / len(order)


def what_views_buy() -> str:
    """Return a line on the accuracy that views buy, which is known for one small data set only."""
    counts, points = (" and ".join(map(str, each)) for each in (POINTS_BELOW, POINTS_BELOW.values()))
    return (
        f"views: on the digits (40 epochs, ten seeds), kd from {counts} views stayed {points} points below a "
        f"new view in every epoch, from {LEVEL_VIEWS} on within chance of it; other data were not measured "
        "(docs/benchmarks.md#how-many-views)"
    )


def _probed(job: Job) -> np.ndarray[Any, Any]:
    return np.arange(min(len(job.source.labels), PROBE_BATCHES * job.batch_size))


def _forward(job: Job, samples: np.ndarray[Any, Any], size: int) -> None:
    pixels = torch.from_numpy(
        render(job.recipe, job.source, samples, draw(job.recipe, job.source, samples, 0), size)
    )
    output = job.runner.run(pixels)
    output.logits.sum().item()
