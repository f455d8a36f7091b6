"""Batches rendered ahead of the step that needs them: in a thread, or in worker processes for image files.

Who renders changes when, never what: pixels are a function of samples and views alone.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from coursepack.data.batches import Batch
from coursepack.errors import CoursepackError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from torch import Tensor

    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source
    from coursepack.data.views import ViewRecipe

MOST_WORKERS = 16
AHEAD = 2
"""Batches that are rendered ahead, per worker."""
MOST_ON_DEVICE = 4 << 30
"""Bytes of images that are copied to a GPU at most."""


class Renderer:
    """Renders the batches of one source and recipe ahead; a context that ends its workers."""

    def __init__(
        self,
        source: Source,
        recipe: ViewRecipe,
        sizes: Sequence[int],
        *,
        workers: int | None = None,
        start_method: str | None = None,
        pin: bool = False,
    ) -> None:
        """Start nothing yet: workers start with the first batch, and stay for all epochs.

        Args:
            source: of the batches.
            recipe: of the batches.
            sizes: sides in pixels that will be asked for.
            workers: processes that decode and render; None means one per core (of those this process may
                use, shared with other ranks on the machine, at most 16) for image files, and none for images
                in memory.
            start_method: of processes, `fork`, `spawn` or `forkserver`; None means the platform's own.
            pin: give pixels in pinned memory, to be copied to a GPU in the background.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.workers = (
            workers if workers is not None else 0 if _is_quick(source) else min(cores, MOST_WORKERS)
        )
        self.sizes = tuple(sizes)
        self._in_thread = (
            self.workers == 0 and recipe.pipeline is None and bool(recipe.pixel_ops or recipe.mix)
        )
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = None
        if self.workers:
            self._loader = DataLoader(
                _Rendered(source, recipe, self.sizes),
                batch_size=None,
                sampler=self._requests,
                num_workers=self.workers,
                prefetch_factor=AHEAD,
                persistent_workers=True,
                pin_memory=pin,
                multiprocessing_context=start_method,
                generator=torch.Generator(),  # else every epoch would draw from torch's global one
            )

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each with its pixels rendered before it is asked for."""
        if self._loader is not None:
            return self._by_workers(batches)
        return self._by_thread(batches) if self._in_thread else iter(batches)

    def _by_workers(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        assert self._loader is not None
        waiting: deque[Batch] = deque()
        self._requests.start(batches, waiting)
        for rendered in self._loader:
            if isinstance(rendered, CoursepackError):
                raise rendered
            batch = waiting.popleft()
            batch.rendered.update(zip(self.sizes, rendered, strict=True))
            yield batch
            if not self._requests.are_of(waiting):
                raise RuntimeError("another epoch of the same renderer has begun: finish one before the next")

    def _by_thread(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[Any] = deque()
            try:
                for batch in batches:
                    waiting.append(pool.submit(self._fill, batch))
                    if len(waiting) > AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _fill(self, batch: Batch) -> Batch:
        if batch.images is None:  # else the device renders, and nothing here would wait for it
            batch.rendered.update(zip(self.sizes, batch.render_all(self.sizes), strict=True))
        return batch

    def close(self) -> None:
        """End the workers."""
        self._loader = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def device_images(source: Source, recipe: ViewRecipe, device: torch.device) -> Tensor | None:
    """The source's images on a GPU, to be rendered there; None where they stay on the CPU."""
    if device.type == "cpu" or source.whole is None or recipe.pipeline is not None:
        return None
    return torch.from_numpy(source.whole).to(device) if source.whole.nbytes <= MOST_ON_DEVICE else None


def _is_quick(source: Source) -> bool:
    return source.whole is not None


class _Requests:
    """The sampler of the workers: which rows to render next, batch by batch."""

    def __init__(self) -> None:
        self._batches: Iterable[Batch] = ()
        self._waiting: deque[Batch] = deque()

    def start(self, batches: Iterable[Batch], waiting: deque[Batch]) -> None:
        self._batches, self._waiting = batches, waiting

    def are_of(self, waiting: deque[Batch]) -> bool:
        """Whether what is rendered is still for those who wait there."""
        return self._waiting is waiting

    def __iter__(self) -> Iterator[tuple[Samples, Samples]]:
        for batch in self._batches:
            self._waiting.append(batch)
            yield batch.samples, batch.views


class _Rendered(Dataset[Any]):
    """What a worker does for a request."""

    def __init__(self, source: Source, recipe: ViewRecipe, sizes: tuple[int, ...]) -> None:
        self._source, self._recipe, self._sizes = source, recipe, sizes

    def __getitem__(self, request: tuple[Samples, Samples]) -> list[Tensor] | CoursepackError:
        batch = Batch(self._source, self._recipe, *request)
        try:
            return batch.render_all(self._sizes)
        except CoursepackError as error:
            return error  # raised by the parent: a DataLoader would put its traceback into the text
