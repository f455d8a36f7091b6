"""Pipeline of stage one: rendering, forward passes, copies and writing of different batches overlap.

    render (thread or worker processes) -> forward pass (thread) -> encode and write (caller's thread)

The caller's thread alone writes to the stores, block after block, so their files appear in the same order and
the same errors leave the same blocks behind as without a pipeline. Outputs that wait to be written take at
most `WAITING_BYTES`, or `LEAST_WAITING` batches, whatever the number of samples, views and arrays. Several
teachers of the same views share what is rendered.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from coursepack.data import batches
from coursepack.data.drift import content_digest, probe_digests, probe_samples
from coursepack.data.views import draw
from coursepack.models.teacher import advice_for, check_finite_rows
from coursepack.precompute.precision import precision_error
from coursepack.precompute.transfer import transfer_for

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from concurrent.futures import Future

    import numpy as np

    from coursepack.data import Batch
    from coursepack.data.loading import Renderer
    from coursepack.data.store import Block
    from coursepack.precompute.job import Job
    from coursepack.precompute.transfer import Pending

LEAST_WAITING, MOST_WAITING = 3, 64
"""Limits of the number of batches whose outputs exist at a time: running, waiting and being written."""
WAITING_BYTES = 64 << 20
"""Bytes of outputs that may wait between those limits, so that slow writes do not stop the teacher."""


class Task(NamedTuple):
    """One block of one job."""

    job: int
    """Index of the job."""
    block: Block


@dataclass(frozen=True)
class Group:
    """Blocks of the same samples, under one or more views and of one or more jobs, computed together."""

    tasks: list[Task]
    records: Future[list[dict[str, Any]]]
    """Record of the done-object of each task's block."""

    @property
    def rows(self) -> int:
        """Number of rows of all tasks."""
        return sum(len(task.block) for task in self.tasks)

    @property
    def views(self) -> list[int]:
        """Views of all tasks, in ascending order."""
        return sorted({task.block.view for task in self.tasks})


@dataclass(frozen=True)
class Outputs:
    """Outputs of a teacher for one batch of one task."""

    group: Group
    index: int
    """Index of the task in the group."""
    batch: Batch
    arrays: dict[str, np.ndarray]
    """Outputs `(N, ...)` float32 by the name of their array, valid until the next batch is requested."""


def teacher_outputs(
    jobs: Sequence[Job], renderer: Renderer, groups: Iterator[list[Task]]
) -> Generator[Outputs]:
    """Yield the outputs of the jobs' teachers for each batch, in order, computed ahead of the caller.

    Every forward pass has images of one block only, so its outputs have the same bits whatever is computed
    together.

    Args:
        jobs: jobs of one source, view recipe and batch size.
        renderer: renderer of the views at the sizes of all teachers.
        groups: tasks of the same samples; advanced in another thread, ahead of the outputs.

    Raises:
        NonFiniteOutput: an output is NaN or infinite.
        CoursepackError: a view cannot be rendered, or a teacher cannot be run on it.
    """
    forward = _ForwardThread(jobs, renderer, groups)
    forward.start()
    try:
        while (result := forward.results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            outputs, finite = result.pending.fetch()
            runner = jobs[result.group.tasks[result.index].job].runner
            advice = advice_for(runner.precision, runner.device)
            check_finite_rows(finite, result.batch.samples.tolist(), runner.network.spec, advice)
            arrays = {name: value.numpy() for name, value in outputs.items()}
            yield Outputs(result.group, result.index, result.batch, arrays)
            result.pending.release()
            forward.free.release()
    finally:
        forward.stop()


@dataclass(frozen=True)
class _Result:
    group: Group
    index: int
    batch: Batch
    pending: Pending


class _ForwardThread(threading.Thread):
    """Thread that runs teachers on one batch after another, a limited number ahead of the caller."""

    def __init__(self, jobs: Sequence[Job], renderer: Renderer, groups: Iterator[list[Task]]) -> None:
        super().__init__(name="coursepack-forward", daemon=True)
        self._jobs, self._renderer, self._groups = jobs, renderer, groups
        self._rendering: deque[Group] = deque()
        """Group of each batch that is being rendered."""
        self._row_bytes: dict[int, int] = {}
        """Bytes of the outputs of a row, by job."""
        self._error: Exception | None = None
        """Error in determining groups, raised after the batches before it."""
        self._stopped = threading.Event()
        self._threads = torch.get_num_threads()
        self.free = threading.Semaphore(LEAST_WAITING)
        """Counts the batches that may still be started."""
        self.results: SimpleQueue[_Result | BaseException | None] = SimpleQueue()
        """Results in order; then None, or the exception that ended the thread."""

    def run(self) -> None:
        """Put the results of all batches into the queue."""
        torch.set_num_threads(self._threads)  # OpenMP keeps the number per thread
        try:
            self._forward()
            self.results.put(self._error)
        except BaseException as error:
            self.results.put(error)

    def stop(self) -> None:
        """End the thread after its current batch and wait for it."""
        self._stopped.set()
        self.free.release()
        self.join()

    def _forward(self) -> None:
        transfers = [transfer_for(job.runner, job.batch_size) for job in self._jobs]
        with closing(self._renderer.ahead(self._batches())) as rendered:
            for loaded in rendered:
                group = self._rendering.popleft()
                views = group.views
                for view, batch in zip(views, loaded.split(len(views)), strict=True):
                    for index, task in enumerate(group.tasks):
                        if task.block.view != view:
                            continue
                        self.free.acquire()
                        if self._stopped.is_set():
                            return
                        size = self._jobs[task.job].runner.network.preprocessing.size
                        pending = transfers[task.job].start(batch.pixels(size))
                        self._widen(task.job, pending.row_bytes)
                        self.results.put(_Result(group, index, batch, pending))
                    batch.rendered.clear()

    def _widen(self, job: int, row_bytes: int) -> None:
        """Allow as many batches ahead as fit into `WAITING_BYTES`, once the rows of all jobs are known."""
        if job in self._row_bytes:
            return
        self._row_bytes[job] = row_bytes
        if len(self._row_bytes) == len(self._jobs):
            fitting = WAITING_BYTES // (max(self._row_bytes.values()) * self._jobs[0].batch_size)
            for _ in range(min(fitting, MOST_WAITING) - LEAST_WAITING):
                self.free.release()

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches of all groups, and end with the first error."""
        try:
            yield from self._batches_of_groups()
        except Exception as error:
            self._error = error

    def _batches_of_groups(self) -> Iterator[Batch]:
        """Yield the batches of all groups, each with the images of all views of its group."""
        first = self._jobs[0]
        for tasks in self._groups:
            if self._stopped.is_set():
                return
            errors = [precision_error(self._jobs[task.job], self._renderer, task.block) for task in tasks]
            records = self._renderer.submit(partial(_records, self._jobs, tasks, errors))
            group = Group(tasks, records)
            for batch in batches(
                first.source,
                first.recipe,
                tasks[0].block.samples,
                views=group.views,
                batch_size=first.batch_size * len(group.views),
            ):
                self._rendering.append(group)
                yield batch


def _records(
    jobs: Sequence[Job], tasks: Sequence[Task], errors: Sequence[dict[str, float] | None]
) -> list[dict[str, Any]]:
    """Return the record of each task's block, with the source's content read once for all of them."""
    records = [block_record(jobs[task.job], task.block) for task in tasks]
    content = None
    for record, task, error in zip(records, tasks, errors, strict=True):
        if task.block.view == 0:
            content = content or content_digest(jobs[0].source, task.block.samples)
            record["content"] = content
        if error is not None:
            record["precision"] = error
    return records


def block_record(job: Job, block: Block) -> dict[str, Any]:
    """Return the record of a block's done-object, used to detect drift of views, without source content."""
    params = draw(job.recipe, job.source, block.samples, block.view)
    probed = probe_samples(len(job.source.labels), block.view)
    probed = probed[(probed >= block.start) & (probed < block.stop)]
    size = job.runner.network.preprocessing.size
    return {
        "draws": params.digest(),
        "probes": probe_digests(job.recipe, job.source, probed, params[probed - block.start], size),
        "environment": job.environment(),
    }
