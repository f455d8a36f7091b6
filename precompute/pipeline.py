"""Pipeline of stage one: rendering, forward passes, copies and writing of different batches overlap.

    render (thread, and worker processes) -> forward pass (thread) -> encode and write (caller's thread)

The caller's thread alone writes to the stores, block after block, so their files appear in the same order and
the same errors leave the same blocks behind as without a pipeline. The other threads begin the next block
while one is written and while its view is committed. Outputs that wait to be written take at most
`WAITING_BYTES`, or `LEAST_WAITING` batches, whatever the number of samples, views and arrays. Several
teachers of the same views share what is rendered.
"""

from __future__ import annotations

from collections import deque
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from coursepack.data import batches
from coursepack.data.drift import digest_of, view_record
from coursepack.data.views import draw
from coursepack.kernels.cpu.threads import end_idle_threads
from coursepack.models.teacher import advice_for, check_finite_rows
from coursepack.precompute.ahead import Ahead
from coursepack.precompute.precision import first_rows, measures_precision, precision_error
from coursepack.precompute.transfer import transfer_for

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from coursepack.data import Batch
    from coursepack.data.loading import Renderer
    from coursepack.data.store import Block
    from coursepack.precompute.job import Job
    from coursepack.precompute.transfer import Pending

LEAST_WAITING, MAX_WAITING = 3, 64
"""Limits of the number of batches whose outputs exist at a time: running, waiting and being written."""
WAITING_BYTES = 64 << 20
"""Bytes of outputs that may wait between those limits, so that slow writes do not stop the teacher."""
CONTENTS = 1024
"""Number of samples whose content is read at a time, so that a stop does not wait for a whole block."""
RENDERED = 4
"""Maximum number of batches that the renderer has handed over and the teacher has not finished."""


class Task(NamedTuple):
    """One block of one job."""

    job: int
    """Index of the job."""
    block: Block


@dataclass
class Group:
    """Blocks of the same samples, under one or more views and of one or more jobs, computed together."""

    tasks: list[Task]
    begun: Future[list[dict[str, Any]]]
    """Record of each task's block, as `block_record` returns it."""
    contents: list[Future[NDArray[np.uint32]]] = field(default_factory=list)
    """Checksums of the source's content, in parts, if one of the views is view 0."""
    first: Batch | None = None
    """Rendered first rows of the source, if the error of a precision has to be measured."""
    errors: dict[int, dict[str, float]] = field(default_factory=dict)
    """Result of `precision_error` by index of the task."""

    @property
    def rows(self) -> int:
        """Number of rows of all tasks."""
        return sum(len(task.block) for task in self.tasks)

    @property
    def views(self) -> list[int]:
        """Views of all tasks, in ascending order."""
        return sorted({task.block.view for task in self.tasks})

    def records(self) -> list[dict[str, Any]]:
        """Return the record of the done-object of each task's block, after all its batches were computed."""
        records = [dict(record) for record in self.begun.result()]
        if self.contents:
            content = digest_of(np.concatenate([part.result() for part in self.contents]))
        for index, (record, task) in enumerate(zip(records, self.tasks, strict=True)):
            if task.block.view == 0:
                record["content"] = content
            if index in self.errors:
                record["precision"] = self.errors[index]
        return records


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
    together. Until the generator is closed, torch uses one thread in all threads but that of the forward
    passes if a teacher runs on the CPU.

    Args:
        jobs: jobs of one source, view recipe and batch size.
        renderer: renderer of the views at the sizes of all teachers.
        groups: tasks of the same samples; advanced in another thread, ahead of the outputs.

    Raises:
        NonFiniteOutput: an output is NaN or infinite.
        CoursepackError: a view cannot be rendered, or a teacher cannot be run on it.
    """
    threads = torch.get_num_threads()
    with _cores_for_teachers(jobs):
        rendered = Ahead("views", _rendered(jobs, renderer, groups), RENDERED, torch.get_num_threads())
        forward = Ahead("forward", _forward(jobs, rendered), LEAST_WAITING, threads)
        with rendered, forward:
            yield from _finished(jobs, rendered, forward)


def _finished(
    jobs: Sequence[Job], rendered: Ahead[tuple[Group, Batch]], forward: Ahead[_Result]
) -> Generator[Outputs]:
    """Yield the outputs of the forward passes, and stop rendering when no more are wanted."""
    row_bytes: dict[int, int] = {}
    try:
        for result in forward:
            task, pending = result.group.tasks[result.index], result.pending
            if task.job not in row_bytes:
                row_bytes[task.job] = pending.row_bytes
                if len(row_bytes) == len(jobs):
                    forward.allow(_waiting(max(row_bytes.values()) * jobs[0].batch_size) - LEAST_WAITING)
            outputs, finite = pending.fetch()
            runner = jobs[task.job].runner
            advice = advice_for(runner.precision, runner.device)
            check_finite_rows(finite, result.batch.samples.tolist(), runner.network.spec, advice)
            arrays = {name: value.numpy() for name, value in outputs.items()}
            yield Outputs(result.group, result.index, result.batch, arrays)
            pending.release()
    finally:
        rendered.stop()


def _waiting(batch_bytes: int) -> int:
    """Return the number of batches whose outputs may exist at a time."""
    return min(max(WAITING_BYTES // batch_bytes, LEAST_WAITING), MAX_WAITING)


@contextmanager
def _cores_for_teachers(jobs: Sequence[Job]) -> Iterator[None]:
    """Limit torch to one thread in this thread while teachers run on the CPU in another.

    Two sets of OpenMP threads on the same cores slow each other down: while they compute, and, since OpenMP
    lets threads sleep between operations if there are more of them than cores, even while one set is idle.
    """
    threads = torch.get_num_threads()
    if any(job.runner.device.type == "cpu" for job in jobs):
        torch.set_num_threads(1)
        end_idle_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Result:
    group: Group
    index: int
    batch: Batch
    pending: Pending


def _forward(jobs: Sequence[Job], rendered: Ahead[tuple[Group, Batch]]) -> Generator[_Result]:
    """Run the teachers on one rendered batch after another."""
    transfers = [transfer_for(job.runner, job.batch_size) for job in jobs]
    for group, loaded in rendered:
        if group.first is not None:
            _measure_precision(jobs, group, group.first)
        views = group.views
        for view, batch in zip(views, loaded.split(len(views)), strict=True):
            for index, task in enumerate(group.tasks):
                if rendered.is_stopped:
                    return
                if task.block.view == view:
                    size = jobs[task.job].runner.network.preprocessing.size
                    yield _Result(group, index, batch, transfers[task.job].start(batch.pixels(size)))
            batch.rendered.clear()


def _measure_precision(jobs: Sequence[Job], group: Group, first: Batch) -> None:
    for index, task in enumerate(group.tasks):
        if measures_precision(jobs[task.job], task.block):
            group.errors[index] = precision_error(jobs[task.job], first)
    group.first = None


def _rendered(
    jobs: Sequence[Job], renderer: Renderer, groups: Iterator[list[Task]]
) -> Generator[tuple[Group, Batch]]:
    """Yield the rendered batches of all groups; an error in determining groups is raised after them."""
    begun: deque[Group] = deque()
    errors: list[Exception] = []

    def wanted() -> Iterator[Batch]:
        try:
            for group, batch in _batches(jobs, renderer, groups):
                begun.append(group)
                yield batch
        except Exception as error:
            errors.append(error)

    with closing(renderer.ahead(wanted())) as rendered:
        for batch in rendered:
            yield begun.popleft(), batch
    if errors:
        raise errors[0]


def _batches(
    jobs: Sequence[Job], renderer: Renderer, groups: Iterator[list[Task]]
) -> Iterator[tuple[Group, Batch]]:
    """Yield the batches of all groups, each with the images of all views of its group."""
    job = jobs[0]
    for tasks in groups:
        group = Group(tasks, renderer.submit(partial(_records, jobs, tasks)))
        views, samples = group.views, tasks[0].block.samples
        if 0 in views:
            parts = (samples[start : start + CONTENTS] for start in range(0, len(samples), CONTENTS))
            group.contents += [renderer.submit(partial(job.source.contents, part)) for part in parts]
        if any(measures_precision(jobs[task.job], task.block) for task in tasks):
            group.first = renderer.submit(partial(first_rows, job, renderer.sizes)).result()
        for batch in batches(
            job.source, job.recipe, samples, views=views, batch_size=job.batch_size * len(views)
        ):
            yield group, batch


def _records(jobs: Sequence[Job], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    return [block_record(jobs[task.job], task.block) for task in tasks]


def block_record(job: Job, block: Block) -> dict[str, Any]:
    """Return the record of a block's done-object, used to detect drift of views, without source content."""
    params = draw(job.recipe, job.source, block.samples, block.view)
    size = job.runner.network.preprocessing.size
    record = view_record(job.recipe, job.source, params, block.start, block.view, size)
    return {**record, "environment": job.environment()}
