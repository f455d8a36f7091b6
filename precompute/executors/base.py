"""The interface between a job and what computes its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from coursepack.console import Meter
    from coursepack.data.store import Block, StoreWriter
    from coursepack.precompute.job import Job


class Executor(Protocol):
    """Computes groups of blocks.

    The caller keeps the store: it owns the part, looks up what is pending and commits views. An executor
    computes blocks and puts their files and done-objects, in this process or in others that make the job
    again from `job.spec`. A block that is computed twice gives the same bytes, so one whose worker is lost
    goes back into the queue.
    """

    def run(
        self, job: Job, writer: StoreWriter, groups: Iterator[list[Block]], meter: Meter | None
    ) -> Generator[list[Block]]:
        """Compute groups of blocks and yield each group when the done-objects of its blocks stand.

        Args:
            job: what to compute.
            writer: the store's, entered.
            groups: blocks of the same samples; each is looked up when it is taken, and taken once.
            meter: counts images as they are done.
        """
