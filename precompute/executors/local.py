"""Executor that computes blocks in this process, one group after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.precompute.write import write_blocks

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from coursepack.console import Meter
    from coursepack.data.store import Block, StoreWriter
    from coursepack.precompute.job import Job


class LocalExecutor:
    """Executor that renders views, runs the teacher and writes blocks in this process."""

    def run(
        self, job: Job, writer: StoreWriter, groups: Iterator[list[Block]], meter: Meter | None
    ) -> Generator[list[Block]]:
        """Compute groups in the given order."""
        with job.renderer() as renderer:
            for blocks in groups:
                for files, sums in write_blocks(job, writer, renderer, blocks, meter):
                    files.finish(sums)
                yield blocks
