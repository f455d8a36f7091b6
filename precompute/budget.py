"""Estimates of a store on a cluster, by encoding: objects, requests, device-hours, money and break-even.

A store's requests are counted for a bucket to which one process writes: a PUT per data file, a done-object
per block, and per view its list and a new manifest. Records under `runs/`, which are written every half
minute, and the reading of what other processes have done are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coursepack.data.encodings import FOR_LOGITS, drops_classes, parse_encoding
from coursepack.data.store.layout import block_count
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.planning import fresh_manifest
from coursepack.data.store.shards import rows_size, shard_size
from coursepack.data.store.zarr_metadata import zarr_keys

if TYPE_CHECKING:
    from coursepack.precompute.job import Job
    from coursepack.precompute.plan import Probe

WARMEST = 2.0
"""Largest distillation temperature for which top-k rows are advised."""
DENSE = "int8"
"""Encoding that is advised instead."""
HALF = "int4"
"""Dense encoding of half its size."""
GIGABYTE = 10**9
THOUSAND = 1000


@dataclass(frozen=True)
class Prices:
    """Prices in one currency; what has no price is not counted."""

    gpu_hour: float = 0.0
    """Price of an hour of the device that runs the teacher."""
    gb_month: float = 0.0
    """Price of storing 10^9 bytes for a month."""
    puts: float = 0.0
    """Price of 1,000 PUT requests."""
    gets: float = 0.0
    """Price of 1,000 GET requests."""


@dataclass(frozen=True)
class Budget:
    """Bytes, objects, requests and times of a whole store in one encoding of its logits."""

    encoding: str
    """Encoding in which logits are stored."""
    rows: int
    views: int
    row_bytes: int
    """Bytes of a row of all arrays."""
    total_bytes: int
    """Bytes of all data files."""
    objects: int
    """Number of objects of the finished store."""
    puts: int
    """PUT requests that write it."""
    gets: int
    """GET requests that read each view once."""
    timing: Probe

    @property
    def hours(self) -> float:
        """Hours of one device that runs the teacher on every row."""
        return self.rows * self.timing.teacher / 3600

    @property
    def break_even(self) -> float:
        """Number of student epochs from which the store takes less time than live teachers."""
        return self.timing.break_even(self.views)

    def writing(self, prices: Prices) -> float:
        """Return the price of computing and writing the store."""
        return self.hours * prices.gpu_hour + self.puts / THOUSAND * prices.puts

    def month(self, prices: Prices) -> float:
        """Return the price of storing it for a month."""
        return self.total_bytes / GIGABYTE * prices.gb_month

    def reading(self, prices: Prices) -> float:
        """Return the price of reading each view once from a bucket."""
        return self.gets / THOUSAND * prices.gets

    def break_even_money(self, prices: Prices) -> float:
        """Return the number of student epochs from which the store costs less than live teachers.

        It is stored for one month, and each epoch reads one view from the bucket. With live teachers, each
        epoch takes the device-hours of one view.
        """
        saved = (self.hours * prices.gpu_hour - self.reading(prices)) / self.views
        return (self.writing(prices) + self.month(prices)) / saved if saved > 0 else math.inf


def budget(job: Job, encoding: str, timing: Probe) -> Budget:
    """Return what a job's whole store takes with its logits in an encoding; nothing is read or written.

    Args:
        job: the job.
        encoding: encoding of the logits.
        timing: times per image of the teacher, and of reading a row.

    Raises:
        UnknownName, RecipeError: there is no such encoding.
    """
    parse_encoding(encoding, FOR_LOGITS)
    manifest = fresh_manifest(replace(job, encoding=encoding).plan())
    samples, views = manifest.samples, manifest.views
    layouts = [layout for array in manifest.arrays.values() for layout in array.components.values()]
    files = sum(layout.shard_count(samples) for layout in layouts)
    tables, metadata = len(manifest.tables), len(zarr_keys(manifest))
    table_bytes = sum(shard_size(table.rows, table.layout) for table in manifest.tables.values())
    blocks = block_count(samples, manifest.block_rows)
    lists_and_manifest = views + 1
    return Budget(
        encoding=manifest.arrays[LOGITS].encoding.name,
        rows=samples * views,
        views=views,
        row_bytes=sum(array.row_bytes for array in manifest.arrays.values()),
        total_bytes=table_bytes + views * sum(rows_size(samples, layout) for layout in layouts),
        objects=views * files + tables + metadata + lists_and_manifest,
        # The manifest is created, and replaced for every view.
        puts=views * (files + blocks) + tables + metadata + views + lists_and_manifest,
        gets=views * (files + 1),
        timing=timing,
    )


def too_warm(encoding: str, temperature: float | None, classes: int) -> str | None:
    """Return a warning if top-k rows of some classes are planned for a high distillation temperature.

    The gradient at temperature T comes from all classes, and more evenly the higher T is; of the classes that
    top-k leaves out, only the mass is known.
    """
    if temperature is None or temperature <= WARMEST or not drops_classes(parse_encoding(encoding)):
        return None
    sizes = [
        sum(part.row_bytes for part in parse_encoding(name).components((classes,)).values())
        for name in (DENSE, HALF, encoding)
    ]
    return (
        f"warning: {encoding} is planned for temperature {temperature:g}. Above {WARMEST:g}, much of the "
        f"gradient comes from the classes that {encoding} leaves out, and students learn from wrong targets. "
        f"--encoding {DENSE} holds at any temperature and takes {sizes[0] / sizes[2]:.1f} times the bytes, "
        f"{HALF} {sizes[1] / sizes[2]:.1f} times for larger errors; "
        f"or distil with a temperature of at most {WARMEST:g}."
    )
