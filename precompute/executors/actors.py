"""Workers of a Ray cluster that write blocks: starting them, and comparing them with each other."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.canonical import difference_table
from coursepack.errors import WorkerLost, WorkerMismatch
from coursepack.precompute.executors.worker import Worker
from coursepack.precompute.numerics import NUMERICS, numeric_entries
from coursepack.ray_workers import Pool, Share, uses_gpus

if TYPE_CHECKING:
    from coursepack.data.store import Block
    from coursepack.precompute.executors.worker import Report
    from coursepack.precompute.job import Job

GRACE_SECONDS = 30.0
"""Time that the first started worker waits for the others before the first block."""


class Comparison:
    """Compares workers with the driver and with the first of them."""

    def __init__(self, identity: dict[str, Any]) -> None:
        """Initialize a comparison with the identity of the store in the driver."""
        self._identity = identity
        self.first: Report | None = None
        """Report of the worker with which the others are compared."""

    def add(self, report: Report) -> None:
        """Compare a worker that has started, as `check_report`."""
        check_report(report, self._identity, self.first)
        self.first = self.first or report


def open_pool(
    ray: Any, job: Job, count: int | None, per_gpu: int | None, comparison: Comparison
) -> Pool[list[Block]]:
    """Return the pool of workers of a job, none of which has started yet.

    Raises:
        RecipeError: the device and the number of workers per GPU contradict each other.
    """
    assert job.spec is not None, "the job has no spec to be recreated from"
    gpus = uses_gpus(job.spec.device, "--workers-per-gpu", per_gpu, ray.cluster_resources())
    spec = replace(job.spec, device="cuda" if gpus else "cpu")
    return Pool(
        ray,
        Worker,
        Share(gpus=math.floor(1e4 / (per_gpu or 1)) / 1e4 if gpus else 0),
        count,
        start=lambda sharing: (spec, str(Path.cwd()), sharing),
        welcome=comparison.add,
    )


def assemble(pool: Pool[list[Block]], comparison: Comparison) -> dict[str, Any]:
    """Wait until workers have started, and return their environment.

    Returns when all have started, or `GRACE_SECONDS` after the first.

    Raises:
        WorkerLost: workers cannot start.
        WorkerMismatch: two workers, or a worker and this process, do not fit.
    """
    since = math.inf
    while True:
        pool.wait()
        now = time.monotonic()
        if comparison.first is not None:
            since = min(since, now)
            if not pool.is_starting or now > since + GRACE_SECONDS:
                return comparison.first.environment


def check_report(report: Report, identity: dict[str, Any], first: Report | None) -> None:
    """Check that a worker would write the same bytes as the others.

    Args:
        report: report of the worker.
        identity: identity of the store in the driver.
        first: report of the first worker, or None for that one itself.

    Raises:
        WorkerLost: the worker could not open the job.
        WorkerMismatch: teacher, source or view differ from the driver's, or numerics from the first worker's.
    """
    if report.error is not None:
        raise WorkerLost(f"the worker on {report.name}, cannot start: {report.error}")
    if table := difference_table(identity, report.identity, "this process", "worker"):
        raise WorkerMismatch(
            f"the worker on {report.name}, would write another store than this process.\n{table}\n"
            "All nodes need the same files and versions of libraries."
        )
    if first is not None and report.environment[NUMERICS] != first.environment[NUMERICS]:
        own, others = (numeric_entries(each.environment) for each in (report, first))
        table = difference_table(others, own, "first", "this one")
        raise WorkerMismatch(
            f"the worker on {report.name}, has other numerics than the first, on {first.name}: the last bits "
            f"of its rows would differ.\n{table}\nRun on nodes of one kind."
        )
