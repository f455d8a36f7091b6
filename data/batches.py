"""Batches of samples and views, with their labels, and their pixels at any size."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from coursepack.data.randomness import Purpose, shuffled
from coursepack.data.views import GRID, draw, render, render_normalized, render_on_device
from coursepack.data.views.params import concatenate
from coursepack.device import to_device
from coursepack.kernels import MixedLabels, normalize

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source
    from coursepack.data.store.owners import Part
    from coursepack.data.views import ViewParams, ViewRecipe


@dataclass
class Batch:
    """Samples, each under one view. Parameters, labels and pixels are computed at first use."""

    source: Source
    recipe: ViewRecipe
    samples: Samples
    """Sample indices `(N,)` int64."""
    views: Samples
    """View index of each sample `(N,)` int64."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device of the labels and pixels."""
    images: Tensor | None = None
    """All images of the source on the device, if views are rendered there."""
    rendered: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Pixels by size, for the sizes rendered so far."""
    global_batch: Batch | None = field(default=None, repr=False)
    """Batch of all ranks, if this batch is one rank's share of it."""
    students: int = 1
    """Number of students that read rows of their own: equal parts of the batch, one after another."""

    @functools.cached_property
    def params(self) -> ViewParams:
        """View parameters, one row per sample."""
        if isinstance(self.view, int):
            return draw(self.recipe, self.source, self.samples, self.view)
        groups = [np.flatnonzero(self.views == view) for view in np.unique(self.views)]
        params = [
            draw(self.recipe, self.source, self.samples[rows], int(self.views[rows[0]])) for rows in groups
        ]
        return concatenate(params)[np.argsort(np.concatenate(groups))]

    @functools.cached_property
    def labels(self) -> Tensor | MixedLabels:
        """Class ids `(N,)` int64; `MixedLabels` if the view mixes images."""
        first = self._labels_of(self.samples)
        mixing = self.params.mixing if self.recipe.mix is not None else None
        if mixing is None:
            return first
        shares = to_device((mixing.shares / GRID).astype(np.float32), self.device)
        return MixedLabels(first, self._labels_of(mixing.partners), shares)

    @functools.cached_property
    def main_labels(self) -> Tensor:
        """Class ids `(N,)` int64; of mixed images, the label with the larger share."""
        if isinstance(self.labels, MixedLabels):
            return torch.where(self.labels.lam >= 0.5, self.labels.first, self.labels.second)
        return self.labels

    @functools.cached_property
    def view(self) -> int | Samples:
        """View index if all samples have the same view, else the view index of each sample `(N,)`."""
        first = int(self.views[0]) if len(self.views) else 0
        return first if bool((self.views == first).all()) else self.views

    def pixels(self, size: int) -> Tensor:
        """Return the rendered views `(N, size, size, channels)` uint8; each size is rendered once."""
        if size not in self.rendered:
            self.rendered[size] = self.render(size)
        moved = self.rendered[size].to(self.device, non_blocking=True)
        self.rendered[size] = moved
        return moved

    def normalized(self, size: int, channel: Sequence[int], table: Tensor) -> Tensor:
        """Return a network's input `(N, channels, size, size)` float32: pixel values mapped through a table.

        Args:
            size: side in pixels.
            channel: for each input channel of the network, the index of the pixels' channel.
            table: `(channels, 256)` float32 on the CPU, the network's input for each pixel value.
        """
        if self.device.type == "cpu" and size not in self.rendered:
            drawn = self.samples, self.params
            images = render_normalized(self.recipe, self.source, *drawn, size, channel, table.numpy())
            if images is not None:
                return torch.from_numpy(images)
        return normalize(self.pixels(size), channel, table)

    def render(self, size: int) -> Tensor:
        """Render the views anew: on the device if the images are there, else on the CPU."""
        return self.render_all([size])[0]

    def render_all(self, sizes: Sequence[int]) -> list[Tensor]:
        """Render the views anew at several sizes; each image file is decoded once for all sizes and views."""
        drawn = self.samples, self.params
        if self.images is not None:
            return [render_on_device(self.recipe, self.images, *drawn, size) for size in sizes]
        source = (
            self.source if self.source.in_memory is not None else cast("Source", _DecodeCache(self.source))
        )
        return [torch.from_numpy(render(self.recipe, source, *drawn, size)) for size in sizes]

    def split(self, count: int) -> list[Batch]:
        """Split the batch into `count` batches of nearly equal size, in order; rendered pixels are kept.

        Each of several students gets its part of every batch.
        """
        by_student = np.arange(len(self)).reshape(self.students, -1)
        own = by_student.shape[1]
        bounds = [own * index // count for index in range(count + 1)]
        slices = [slice(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]
        if self.students > 1:
            return [self._rows(by_student[:, rows].ravel()) for rows in slices]
        return [self._rows(rows) for rows in slices]

    def of_student(self, index: int) -> Batch:
        """Return the rows of one of the students that read rows of their own, the same batch every time.

        It has the pixels that are rendered by now.
        """
        part = self._by_student[index]
        own = slice(index * len(part), (index + 1) * len(part))
        part.rendered.update({size: pixels[own] for size, pixels in self.rendered.items()})
        return part

    @functools.cached_property
    def _by_student(self) -> list[Batch]:
        parts = replace(self, students=1).split(self.students)
        assert len(parts) == self.students, f"{len(self)} rows are not enough for {self.students} students"
        return parts

    def share(self, part: Part) -> Batch:
        """Return the rows of one rank."""
        return replace(self._rows(shares(len(self), part.count)[part.index]), global_batch=self)

    def _rows(self, rows: slice | Samples) -> Batch:
        rendered = {size: pixels[rows] for size, pixels in self.rendered.items()}
        return replace(self, samples=self.samples[rows], views=self.views[rows], rendered=rendered)

    def _labels_of(self, samples: Samples) -> Tensor:
        return to_device(self.source.labels[samples], self.device)

    def __len__(self) -> int:
        return len(self.samples)


class _DecodeCache:
    """Wrapper of a source of image files that decodes each image once and keeps it."""

    in_memory = None

    def __init__(self, source: Source) -> None:
        self.channels = source.channels
        self._source = source
        self._decoded: dict[int, NDArray[np.uint8]] = {}

    def pixels(self, samples: Samples) -> list[NDArray[np.uint8]]:
        """Return the images `(H, W, channels)` of the samples."""
        indices = samples.tolist()
        missing = [sample for sample in dict.fromkeys(indices) if sample not in self._decoded]
        self._decoded.update(zip(missing, self._source.pixels(np.array(missing, np.int64)), strict=True))
        return [self._decoded[sample] for sample in indices]


def epoch_order(samples: Samples, *, seed: int, epoch: int, window: Window | None = None) -> Samples:
    """Return the samples in the order of an epoch, which depends on seed, epoch and sample index alone.

    With a window, chunks come in random order and samples are shuffled within a window of several chunks, so
    that only one window has to be in memory. All teachers share the same order.
    """
    if window is None:
        return shuffled(samples, seed, epoch, Purpose.ORDER)
    number = _window_numbers(samples // window.chunk_rows, window, seed, epoch)
    order = samples[np.argsort(number, kind="stable")]
    ends = np.cumsum(np.bincount(number))
    # The keys of a window fit into the processor's cache; those of all samples do not.
    for rows in np.split(order, ends[:-1]):
        rows[:] = shuffled(rows, seed, epoch, Purpose.ORDER)
    return order


def _window_numbers(chunks: Samples, window: Window, seed: int, epoch: int) -> NDArray[np.unsignedinteger]:
    """Return the number of each sample's window `(N,)` from the samples' chunks."""
    distinct = shuffled(np.flatnonzero(np.bincount(chunks)), seed, epoch, Purpose.CHUNK_ORDER)
    numbers = np.arange(len(distinct)) // window.chunks
    # NumPy sorts integers of 16 bits or less in linear time.
    by_chunk = np.empty(int(distinct.max(initial=0)) + 1, dtype=np.min_scalar_type(numbers.max(initial=0)))
    by_chunk[distinct] = numbers
    return by_chunk[chunks]


@dataclass(frozen=True)
class Window:
    """Number of store rows in memory at a time, for stores that do not fit into memory."""

    chunk_rows: int
    chunks: int

    @property
    def rows(self) -> int:
        """Number of samples that are shuffled together."""
        return self.chunk_rows * self.chunks


def batches(
    source: Source,
    recipe: ViewRecipe,
    order: Samples,
    *,
    views: Sequence[int],
    batch_size: int,
    device: torch.device | None = None,
    images: Tensor | None = None,
    first: int = 0,
    part: Part | None = None,
) -> Iterator[Batch]:
    """Yield batches of the samples in the given order; the last batch may be smaller.

    Args:
        source: source of the samples.
        recipe: view recipe.
        order: sample indices `(N,)`.
        views: view indices. With several views, a batch holds fewer samples, each under all of these views,
            and each image is decoded once for all of them.
        batch_size: number of rows (sample, view) per batch, at least the number of views.
        device: device of labels and pixels. Defaults to the CPU.
        images: all images of the source on the device, to render views there.
        first: index of the first batch to yield, for resuming; earlier batches are neither drawn nor
            rendered.
        part: yield only this rank's share of each batch's rows.

    Raises:
        ValueError: `batch_size` is smaller than the number of views.
    """
    samples_per_batch = batch_size // len(views)
    if samples_per_batch < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least one row per view ({len(views)})")
    for start in range(first * samples_per_batch, len(order), samples_per_batch):
        chosen = order[start : start + samples_per_batch]
        rows = np.tile(chosen, len(views))
        view_of_row = np.repeat(np.asarray(views, dtype=np.int64), len(chosen))
        batch = Batch(source, recipe, rows, view_of_row, device or torch.device("cpu"), images)
        yield batch if part is None else batch.share(part)


def join(parts: Sequence[Batch]) -> Batch:
    """Return one batch of several of the same size, each the rows of one student."""
    if len(parts) == 1:
        return parts[0]
    samples, views = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("samples", "views")
    )
    return replace(parts[0], samples=samples, views=views, rendered={}, students=len(parts))


def shares(rows: int, count: int) -> list[slice]:
    """Return the slice of a batch's rows that each of `count` ranks gets."""
    return [slice(rows * index // count, rows * (index + 1) // count) for index in range(count)]
