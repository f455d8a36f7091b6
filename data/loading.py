"""Rendering of batches ahead of their use, in a thread or in worker processes.

Image files are decoded and rendered by worker processes, images in memory by a thread if the view changes
pixels or the caller wants it. Pixels are a function of samples and views alone, so they do not depend on
which of the two renders them.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from coursepack.data.batches import Batch
from coursepack.errors import CoursepackError
from coursepack.kernels.cpu.threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from types import TracebackType

    from torch import Tensor

    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source
    from coursepack.data.views import ViewRecipe

T = TypeVar("T")

MAX_WORKERS = 16
AHEAD = 2
"""Number of batches rendered in advance, per worker."""
MAX_ON_DEVICE = 4 << 30
"""Maximum size in bytes of the images that are copied to a GPU."""


class Renderer:
    """Renders the batches of a source and view recipe in advance.

    A context manager: leaving it ends the worker processes and the threads.
    """

    def __init__(
        self,
        source: Source,
        recipe: ViewRecipe,
        sizes: Sequence[int],
        *,
        workers: int | None = None,
        start_method: str | None = None,
        pin: bool = False,
        background: bool = False,
        inline: bool = False,
    ) -> None:
        """Create the renderer. Workers start with the first batch and stay alive for all epochs.

        Args:
            source: source of the batches.
            recipe: view recipe of the batches.
            sizes: sides in pixels to render.
            workers: number of processes that decode and render. Defaults to 0 for images in memory; for image
                files to one per core that this process may use, divided among the ranks on this machine, at
                most 16.
            start_method: how processes start: `fork`, `spawn` or `forkserver`. Defaults to `spawn` for
                sources in buckets, whose client hangs in forks, else to the platform's method.
            pin: return pixels in pinned memory, for asynchronous copies to a GPU.
            background: render images in memory in a thread even if the view does not change pixels, instead
                of at their first use.
            inline: where there are no processes, render in the thread that asks for the next batch, which is
                one of the caller's for this purpose.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.workers = (
            workers if workers is not None else 0 if _is_in_memory(source) else min(cores, MAX_WORKERS)
        )
        self.sizes = tuple(sizes)
        self._pin = pin
        self._inline = inline
        self._uses_thread = (
            self.workers == 0
            and not inline
            and recipe.pipeline is None
            and (background or bool(recipe.pixel_ops or recipe.mix))
        )
        self._is_in_memory = _is_in_memory(source)
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = None
        if self.workers:
            self._loader = DataLoader(
                _RenderDataset(source, recipe, self.sizes),
                batch_size=None,
                sampler=self._requests,
                num_workers=self.workers,
                prefetch_factor=AHEAD,
                persistent_workers=True,
                pin_memory=pin,
                multiprocessing_context=start_method or ("spawn" if _is_remote(source) else None),
                generator=torch.Generator(),  # the default would draw from torch's global generator
            )

    def ahead(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """Yield the batches with their pixels rendered in advance."""
        if self._loader is not None:
            return self._by_workers(batches)
        if self._uses_thread:
            return self._by_thread(batches)
        return (self._fill(batch) if self._inline else batch for batch in batches)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Call a function that reads the source, and return its future result.

        It runs in a thread of its own beside worker processes and for images in memory. A source that loads
        samples in this process is used by one thread at a time: the function runs in the thread that
        renders, or at once where the renderer has no thread.
        """
        if self.workers or self._is_in_memory:
            return self._thread("read").submit(work)
        if self._uses_thread:
            return self._thread("render").submit(work)
        done: Future[T] = Future()
        try:
            done.set_result(work())
        except CoursepackError as error:
            done.set_exception(error)
        return done

    def _by_workers(self, batches: Iterable[Batch]) -> Generator[Batch]:
        assert self._loader is not None
        pending: deque[Batch] = deque()
        self._requests.start(batches, pending)
        for rendered in self._loader:
            if isinstance(rendered, CoursepackError):
                raise rendered
            batch = pending.popleft()
            batch.rendered.update(zip(self.sizes, rendered, strict=True))
            yield batch
            if not self._requests.is_current(pending):
                raise RuntimeError("another epoch of the same renderer has begun: finish one before the next")

    def _by_thread(self, batches: Iterable[Batch]) -> Generator[Batch]:
        pending: deque[Future[Batch]] = deque()
        try:
            for batch in batches:
                pending.append(self._thread("render").submit(self._fill, batch))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _thread(self, name: str) -> ThreadPoolExecutor:
        if name not in self._pools:
            # More threads would wait for those of the step or of the teacher, and these for them.
            self._pools[name] = ThreadPoolExecutor(1, f"coursepack-{name}", use_threads, (1,))
        return self._pools[name]

    def _fill(self, batch: Batch) -> Batch:
        if batch.images is None:  # otherwise the device renders, asynchronously
            pixels = batch.render_all(self.sizes)
            pixels = [each.pin_memory() for each in pixels] if self._pin else pixels
            batch.rendered.update(zip(self.sizes, pixels, strict=True))
        return batch

    def close(self) -> None:
        """End the worker processes and the threads."""
        self._loader = None
        while self._pools:
            self._pools.popitem()[1].shutdown(cancel_futures=True)

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def device_images(source: Source, recipe: ViewRecipe, device: torch.device) -> Tensor | None:
    """Copy the source's images to a GPU for rendering there; return None if they are rendered on the CPU.

    Views with ops on rendered pixels are rendered on the CPU, beside the training step: the ops change one
    image at a time, which takes a GPU more launches than a step has.
    """
    if device.type == "cpu" or source.in_memory is None or recipe.pipeline is not None or recipe.pixel_ops:
        return None
    return torch.from_numpy(source.in_memory).to(device) if source.in_memory.nbytes <= MAX_ON_DEVICE else None


def _is_in_memory(source: Source) -> bool:
    return source.in_memory is not None


def _is_remote(source: Any) -> bool:
    """Return True if a source, or the one that it is a part of, reads samples over a network."""
    while hasattr(source, "source"):
        source = source.source
    return bool(getattr(source, "is_remote", False))


class _Requests:
    """Sampler of the DataLoader: yields the samples and views of one batch after the other."""

    def __init__(self) -> None:
        self._batches: Iterable[Batch] = ()
        self._pending: deque[Batch] = deque()

    def start(self, batches: Iterable[Batch], pending: deque[Batch]) -> None:
        self._batches, self._pending = batches, pending

    def is_current(self, pending: deque[Batch]) -> bool:
        """Return True if `pending` belongs to the epoch that is being rendered."""
        return self._pending is pending

    def __iter__(self) -> Iterator[tuple[Samples, Samples]]:
        for batch in self._batches:
            self._pending.append(batch)
            yield batch.samples, batch.views


class _RenderDataset(Dataset[Any]):
    """Dataset of the DataLoader: renders the samples and views of a request in a worker process."""

    def __init__(self, source: Source, recipe: ViewRecipe, sizes: tuple[int, ...]) -> None:
        self._source, self._recipe, self._sizes = source, recipe, sizes

    def __getitem__(self, request: tuple[Samples, Samples]) -> list[Tensor] | CoursepackError:
        batch = Batch(self._source, self._recipe, *request)
        try:
            return batch.render_all(self._sizes)
        except CoursepackError as error:
            return error  # raised in the parent, because a DataLoader adds its traceback to the message
