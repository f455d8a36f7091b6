"""Interface between a job and the executor that computes its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from contextlib import AbstractContextManager

    from coursepack.console import Meter
    from coursepack.data.store import Block, StoreWriter
    from coursepack.precompute.job import Job


class Executor(Protocol):
    """Computes groups of blocks.

    The caller manages the store: it owns the part, determines the pending blocks and commits views. An
    executor computes blocks and writes their files and done-objects, in this process or in others that
    recreate the job from `job.spec`. Computing a block twice produces the same bytes, so a block whose worker
    is lost can be queued again.
    """

    def started(self, job: Job) -> AbstractContextManager[dict[str, Any]]:
        """Start what computes the blocks; the value is its environment, as in `Job.environment`.

        `run` is called within this context. Nothing has been written to the store yet.
        """

    def run(
        self, job: Job, writer: StoreWriter, groups: Iterator[list[Block]], meter: Meter | None
    ) -> Generator[list[Block]]:
        """Compute groups of blocks, and yield each group once the done-objects of its blocks are written.

        Args:
            job: job that the blocks belong to.
            writer: writer of the store, already entered as a context manager.
            groups: groups of pending blocks of the same samples, determined lazily as the iterator advances.
            meter: progress meter, advanced by the number of finished images.
        """
