"""Blocks of one store over 1, 2 and 4 workers of a Ray cluster on this machine, with teachers that sleep.

    python benchmarks/scaling.py [--json FILE] [--quick]

A teacher sleeps 50 ms for a batch, so that two cores do not limit four workers. Seconds are those from the
first group that is handed out to the last that is written; starting the cluster and its workers is left out.
The overhead of a block is the time of one worker minus that of the executor `local`, divided by the number of
blocks; it includes what `local` overlaps with the next block and a worker does not. Needs the extra
`cluster`. A full run takes about six minutes.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _harness import PATIENCE, arguments, measure, ratios, report, row
from _sleeping import SLEEP

from coursepack.data import view_recipe
from coursepack.precompute import run_job
from coursepack.precompute.executors import LocalExecutor, RayExecutor
from coursepack.precompute.spec import PrecomputeSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from _harness import Row, Seconds

    from coursepack.console import Meter
    from coursepack.data.store import Block, StoreWriter
    from coursepack.precompute import Job
    from coursepack.precompute.executors.base import Executor

BARS = {2: ">= 1.9", 4: ">= 3.6"}
BATCH, BLOCK_BATCHES, CLASSES = 64, 4, 100


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    blocks: int
    rounds: int
    workers: tuple[int, ...]
    """Numbers of workers."""
    patience: float = PATIENCE
    warm_up: bool = True


FULL, QUICK = Size(40, 6, (1, 2, 4)), Size(4, 1, (1, 2), patience=0, warm_up=False)


@dataclass
class Timed:
    """Executor that measures how long another one computes blocks."""

    inner: Executor
    seconds: float = field(default=0.0, init=False)

    @contextmanager
    def started(self, job: Job) -> Iterator[dict[str, Any]]:
        with self.inner.started(job) as environment:
            yield environment

    def run(
        self, job: Job, writer: StoreWriter, groups: Iterator[list[Block]], meter: Meter | None
    ) -> Generator[list[Block]]:
        begun = time.perf_counter()
        yield from self.inner.run(job, writer, groups, meter)
        self.seconds = time.perf_counter() - begun


def seconds_of(make: Callable[[], Executor], blocks: int) -> float:
    """Return the seconds in which an executor writes a store."""
    rows = BATCH * BLOCK_BATCHES
    with tempfile.TemporaryDirectory() as folder:
        spec = PrecomputeSpec(
            "python:_sleeping:Sleeping",
            f"fake,classes={CLASSES},size=8,samples={rows * blocks}",
            view_recipe("none").model_dump(mode="json"),
            str(Path(folder) / "s.zarr"),
            views=1,
            weights="own",
            device="cpu",
            batch_size=BATCH,
            block_rows=rows,
        )
        executor = Timed(make())
        run_job(spec.job(), executor=executor, quiet=True)
        return executor.seconds


def named(count: int) -> str:
    """Return the name of a variant.

    >>> named(1), named(2)
    ('1 worker', '2 workers')
    """
    return f"{count} worker{'s' if count != 1 else ''}"


def scaling(size: Size) -> list[Row]:
    """Measure the executors."""
    local: Callable[[], Executor] = LocalExecutor
    variants: dict[str, Callable[[], Any]] = {"local": partial(seconds_of, local, size.blocks)}
    for count in size.workers:
        make = partial(RayExecutor, actors=count)
        variants[named(count)] = partial(seconds_of, make, size.blocks)
    config = {"blocks": size.blocks, "batches a block": BLOCK_BATCHES, "ms a batch": 1000 * SLEEP}

    def rows_of(seconds: Seconds) -> list[Row]:
        found = [row(f"blocks: {name}", values, "s", config) for name, values in seconds.items()]
        for count in size.workers[1:]:
            values = ratios(seconds, named(1), named(count))
            found.append(row(f"blocks: {count} workers, speed vs one", values, "x", config, BARS[count]))
        pairs = zip(seconds[named(1)], seconds["local"], strict=True)
        overhead = [1000 * (one - alone) / size.blocks for one, alone in pairs]
        return [*found, row("blocks: overhead of a block with one worker", overhead, "ms", config)]

    return measure(variants, size.rounds, rows_of, patience=size.patience, warm_up=size.warm_up)


def main() -> None:
    chosen = arguments("Blocks over the workers of a Ray cluster.").parse_args()
    # Workers import the teacher from this folder.
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    size = QUICK if chosen.quick else FULL
    ray.init(
        "local",
        num_cpus=max(size.workers),
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        rows = scaling(size)
    finally:
        ray.shutdown()
    report("Blocks over workers", rows, chosen.json)


if __name__ == "__main__":
    main()
