"""Executor that computes blocks in this process, one group after another."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from coursepack.precompute.pipeline import Task
from coursepack.precompute.write import write_groups

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from coursepack.console import Meter
    from coursepack.data.store import Block, StoreWriter
    from coursepack.precompute.job import Job

T = TypeVar("T")


class LocalExecutor:
    """Executor that renders views, runs the teacher and writes blocks in this process, at the same time."""

    @contextmanager
    def started(self, job: Job) -> Iterator[dict[str, Any]]:
        """Yield the environment of this process."""
        yield job.environment()

    def run(
        self, job: Job, writer: StoreWriter, groups: Iterator[list[Block]], meter: Meter | None
    ) -> Generator[list[Block]]:
        """Compute groups in the given order.

        The next groups are determined in another thread while a group is written, but not while the caller
        has control to commit.
        """
        turn = threading.Lock()
        tasks = ([Task(0, block) for block in blocks] for blocks in groups)
        with job.renderer() as renderer:
            pending = in_turn(tasks, turn)
            with closing(write_groups([job], [writer], renderer, pending, meter)) as finished:
                for group, written in finished:
                    for files, sums in written:
                        files.finish(sums)
                    with turn:
                        yield [task.block for task in group]


def in_turn(items: Iterator[T], turn: threading.Lock) -> Iterator[T]:
    """Yield the items of an iterator; each is determined while the lock is held."""
    while True:
        with turn:
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
