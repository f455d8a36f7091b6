"""Executor that computes blocks on the workers of a Ray cluster.

The driver, the process that runs the job, keeps the store's part, hands out groups of blocks and commits
views. A group whose worker dies is queued again.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from coursepack.data.store.owners import RUNS
from coursepack.errors import WorkerLost
from coursepack.precompute.executors.actors import Comparison, assemble, open_pool
from coursepack.precompute.executors.worker import Witness
from coursepack.ray_workers import MAX_LOSSES, connected, import_ray

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from coursepack.console import Meter
    from coursepack.data.store import Block, StoreWriter
    from coursepack.precompute.job import Job
    from coursepack.ray_workers import Pool


class RayExecutor:
    """Executor that computes blocks on the workers of a Ray cluster."""

    def __init__(
        self, address: str | None = None, actors: int | None = None, workers_per_gpu: int | None = None
    ) -> None:
        """Initialize an executor; `started` connects it.

        Args:
            address: address of the cluster, or `auto` for the one that this machine belongs to. Defaults to
                the environment variable RAY_ADDRESS, and without it to a cluster of this machine alone.
            actors: number of workers. Defaults to as many as the nodes have GPUs or, without GPUs, CPUs.
            workers_per_gpu: number of workers that share a GPU. Defaults to 1.

        Raises:
            RecipeError: ray is not installed, or the address is one of Ray Client.
        """
        import_ray(address)
        self._address, self._count, self._per_gpu = address, actors, workers_per_gpu
        self._pool: Pool[list[Block]] | None = None

    @contextmanager
    def started(self, job: Job) -> Iterator[dict[str, Any]]:
        """Start workers, compare them with each other and with this process, and yield their environment.

        Raises:
            WorkerLost: the cluster cannot be reached, or workers cannot start.
            WorkerMismatch: a worker has another teacher, source or view, or other numerics than the first.
        """
        with connected(self._address) as ray:
            comparison = Comparison(job.plan().identity)
            pool = self._pool = open_pool(ray, job, self._count, self._per_gpu, comparison)
            try:
                yield assemble(pool, comparison)
            finally:
                pool.dismiss()
                self._pool = None

    def run(
        self, job: Job, writer: StoreWriter, groups: Iterator[list[Block]], meter: Meter | None
    ) -> Generator[list[Block]]:
        """Hand out groups in the given order, and yield each once it is written.

        Raises:
            WorkerLost: a group has lost `MAX_LOSSES` workers, workers cannot start, or a node does not share
                the store's file system.
            WorkerMismatch: a worker that joined does not fit.
            CoursepackError: a worker's error that is not the loss of the worker.
        """
        pool = self._pool
        assert pool is not None, "run is called within started"
        queue = _Queue(writer, groups)
        # One key for a part, so that the next run removes what a killed driver leaves.
        key = f"{RUNS}/{job.part.index}of{job.part.count}.witness"
        witness = Witness(key, secrets.token_hex(16).encode())
        writer.location.put(key, witness.content)
        try:
            while True:
                while pool.has_idle and (group := queue.take()) is not None:
                    pool.hand_out(group, "write", group, witness)
                if not pool.is_busy and queue.is_empty:
                    return
                for ended in pool.wait():
                    done = ended.work if ended.loss is None else queue.put_back(ended.work, ended.loss)
                    if meter is not None and done:
                        views = f"view {done[-1].view + 1} of {writer.manifest.views}"
                        meter.advance(sum(map(len, done)), f"{views}, {pool.describe()}")
                    if done:
                        yield done
        finally:
            writer.location.delete(key)


class _Queue:
    """Groups of blocks that are still to be computed."""

    def __init__(self, writer: StoreWriter, groups: Iterator[list[Block]]) -> None:
        self._writer, self._groups = writer, groups
        self._lost: deque[list[Block]] = deque()
        self._losses: Counter[tuple[int, int]] = Counter()
        self.is_empty = False
        """True once `take` has returned None and nothing was put back since."""

    def take(self) -> list[Block] | None:
        """Return the next group, of those that were put back first, or None if there is none."""
        group = self._lost.popleft() if self._lost else next(self._groups, None)
        self.is_empty = group is None
        return group

    def put_back(self, group: list[Block], loss: str) -> list[Block]:
        """Queue the unfinished blocks of a group again; returns the others.

        Raises:
            WorkerLost: the group was lost `MAX_LOSSES` times.
        """
        numbers = [block.view * self._writer.blocks + block.index for block in group]
        left = list(self._writer.pending(numbers))
        keys = {(block.view, block.index) for block in left}
        self._losses.update(keys)
        if left and max(self._losses[key] for key in keys) >= MAX_LOSSES:
            views = ", ".join(str(block.view) for block in left)
            raise WorkerLost(
                f"block {left[0].index} (samples {left[0].start:,} to {left[0].stop - 1:,}) of view {views} "
                f"was lost with its worker {MAX_LOSSES} times, the last time because: {loss}. Finished "
                "blocks are kept. If the nodes are short of memory, give fewer --actors or --workers; then "
                "run the same command again"
            )
        if left:
            self._lost.append(left)
            self.is_empty = False
        return [block for block in group if (block.view, block.index) not in keys]
