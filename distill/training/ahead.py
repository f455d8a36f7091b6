"""Copies of batches and targets to a GPU on a stream of its own, one batch ahead of the training step.

While a step runs, the rows of the next batch are gathered into pinned memory and copied, and its views are
copied or rendered. The step then waits for an event on the device, and nothing waits on the host. Without a
GPU nothing is done ahead. With micro-batches or live teachers, only pixels and labels are copied ahead, and
targets are fetched in the step.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from coursepack.distill.losses.base import Step
from coursepack.distill.targets.stores import CachedTargets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from coursepack.data import Batch
    from coursepack.distill.targets.base import Targets, TargetSource
    from coursepack.distill.training.state import TrainState

    Fetch = Callable[[Batch, Step], Targets | None]

cuda: Any = torch.cuda  # its classes have no types


class Stream(Protocol):
    """Stream on which copies are queued."""

    def queue(self) -> AbstractContextManager[None]:
        """Queue the work inside the context on the stream."""

    def mark(self) -> Any:
        """Return an event after all work that is queued."""

    def wait(self, event: Any, tensors: Iterable[Tensor]) -> None:
        """Let the current stream wait for an event and keep the memory of tensors that it will read."""


class CudaStream:
    """Stream of a CUDA device beside the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, cuda.Stream(device)

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Queue the work inside the context on the stream."""
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        """Return an event after all work that is queued."""
        event = cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, event: Any, tensors: Iterable[Tensor]) -> None:
        """Let the current stream wait for an event and keep the memory of tensors that it will read."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in tensors:
            # Otherwise the memory could be given to a later copy while the step still reads it.
            tensor.record_stream(current)


class CopiesAhead:
    """Copies batches, and fetches their targets, one batch ahead."""

    def __init__(self, stream: Stream, fetch: Fetch, *, sizes: Sequence[int]) -> None:
        """Create it for one epoch.

        Args:
            stream: stream for the copies.
            fetch: fetches the targets of some rows.
            sizes: sides in pixels of the views that the step reads.
        """
        self._stream, self._fetch, self._sizes = stream, fetch, tuple(sizes)
        self._targets: dict[int, Targets | None] = {}
        """Targets of the current batch, by the identity of their rows."""

    def batches(
        self,
        batches: Iterable[Batch],
        rows_of: Callable[[Batch], Sequence[Batch]],
        epoch: int = 0,
        first: int = 0,
    ) -> Iterator[Batch]:
        """Yield the batches, each after the copies of the next one are queued.

        Args:
            batches: batches of the epoch, starting with batch `first`.
            rows_of: rows of a batch whose targets are fetched ahead; empty for those fetched in the step.
            epoch: index of the epoch.
            first: index of the first batch.
        """
        ready: tuple[Batch, dict[int, Targets | None], Any, list[Tensor]] | None = None
        for index, batch in enumerate(batches, first):
            following = self._copy(batch, rows_of(batch), Step(epoch, index))
            if ready is not None:
                yield self._begin(*ready)
            ready = following
        if ready is not None:
            yield self._begin(*ready)

    def fetch(self, rows: Batch, step: Step) -> Targets | None:
        """Return the targets that were fetched ahead, or fetch them now."""
        key = id(rows)
        return self._targets[key] if key in self._targets else self._fetch(rows, step)

    def _copy(
        self, batch: Batch, rows_of_batch: Sequence[Batch], step: Step
    ) -> tuple[Batch, dict[int, Targets | None], Any, list[Tensor]]:
        with self._stream.queue():
            copied: list[Any] = [batch.labels, *(batch.pixels(size) for size in self._sizes)]
            targets = {}
            for rows in rows_of_batch:
                targets[id(rows)] = self._fetch(rows, step)
                copied += [rows.labels, targets[id(rows)]]
        return batch, targets, self._stream.mark(), list(tensors_of(copied))

    def _begin(
        self, batch: Batch, targets: dict[int, Targets | None], event: Any, copied: list[Tensor]
    ) -> Batch:
        self._stream.wait(event, copied)
        self._targets = targets
        return batch


def copied_ahead(
    states: Sequence[TrainState],
    batches: Iterable[Batch],
    targets: TargetSource | None,
    fetch: Fetch,
    epoch: int,
    first: int,
    *,
    whole: bool,
) -> tuple[Iterable[Batch], Fetch]:
    """Return the batches and the function that fetches targets, with copies ahead if students are on a GPU.

    Args:
        states: the students.
        batches: batches of the epoch, starting with batch `first`.
        targets: source of the targets.
        fetch: fetches the targets of some rows.
        epoch: index of the epoch.
        first: index of the first batch.
        whole: True if batches are not split into micro-batches.
    """
    device = next(states[0].learner.parameters()).device
    if device.type != "cuda":
        return batches, fetch
    is_ahead = whole and isinstance(targets, CachedTargets)
    sizes = {state.learner.network.preprocessing.size for state in states}
    ahead = CopiesAhead(CudaStream(device), fetch, sizes=sorted(sizes))

    def rows_of(batch: Batch) -> list[Batch]:
        rows = [state.learner.rows_for(batch) for state in states] if is_ahead else []
        return list({id(each): each for each in rows}.values())

    return ahead.batches(batches, rows_of, epoch, first), ahead.fetch


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
