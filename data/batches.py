"""Batches: which samples, which view, their labels, and their pixels at any size that is asked for."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from coursepack.data.randomness import Purpose, shuffled
from coursepack.data.views import GRID, draw, render, render_normalised, render_on_device
from coursepack.data.views.params import concatenate
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
    """Some samples under one view each."""

    source: Source
    recipe: ViewRecipe
    samples: Samples
    """Sample indices `(N,)` int64."""
    views: Samples
    """View index of each sample `(N,)` int64."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where labels and pixels are given."""
    images: Tensor | None = None
    """The source's whole images on the device, where they are to be rendered there."""
    rendered: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Pixels by size, as far as they were asked for or rendered ahead."""
    whole: Batch | None = field(default=None, repr=False)
    """The rows of all ranks, where these are one rank's share of them."""

    @functools.cached_property
    def params(self) -> ViewParams:
        """What was drawn for each row."""
        if isinstance(self.view, int):
            return draw(self.recipe, self.source, self.samples, self.view)
        rows = [np.flatnonzero(self.views == view) for view in np.unique(self.views)]
        parts = [
            draw(self.recipe, self.source, self.samples[some], int(self.views[some[0]])) for some in rows
        ]
        return concatenate(parts)[np.argsort(np.concatenate(rows))]

    @functools.cached_property
    def labels(self) -> Tensor | MixedLabels:
        """Class ids `(N,)` int64; two and a share where the view mixes images."""
        first = self._labels_of(self.samples)
        mixing = self.params.mixing if self.recipe.mix is not None else None
        if mixing is None:
            return first
        shares = torch.from_numpy((mixing.shares / GRID).astype(np.float32)).to(self.device)
        return MixedLabels(first, self._labels_of(mixing.partners), shares)

    @functools.cached_property
    def main_labels(self) -> Tensor:
        """Class ids `(N,)` int64: where images are mixed, that of the larger share."""
        if isinstance(self.labels, MixedLabels):
            return torch.where(self.labels.lam >= 0.5, self.labels.first, self.labels.second)
        return self.labels

    @functools.cached_property
    def view(self) -> int | Samples:
        """The view that all samples share, or each sample's own."""
        first = int(self.views[0]) if len(self.views) else 0
        return first if bool((self.views == first).all()) else self.views

    def pixels(self, size: int) -> Tensor:
        """Rendered views `(N, size, size, channels)` uint8; rendered once per size."""
        if size not in self.rendered:
            self.rendered[size] = self.render(size)
        moved = self.rendered[size].to(self.device, non_blocking=True)
        self.rendered[size] = moved
        return moved

    def normalised(self, size: int, channel: Sequence[int], table: Tensor) -> Tensor:
        """What a network reads, `(N, channels, size, size)` float32: each level of the pixels looked up.

        Args:
            size: side in pixels.
            channel: for each channel of the network the one of the pixels.
            table: `(channels, 256)` float32 on the CPU.
        """
        if self.device.type == "cpu" and size not in self.rendered:
            of_rows = self.samples, self.params
            images = render_normalised(self.recipe, self.source, *of_rows, size, channel, table.numpy())
            if images is not None:
                return torch.from_numpy(images)
        return normalize(self.pixels(size), channel, table)

    def render(self, size: int) -> Tensor:
        """The same, rendered anew: on the device where the images are there, else on the CPU."""
        return self.render_all([size])[0]

    def render_all(self, sizes: Sequence[int]) -> list[Tensor]:
        """Rendered anew at several sizes; an image file is decoded once for all of them and for all views."""
        of_rows = self.samples, self.params
        if self.images is not None:
            return [render_on_device(self.recipe, self.images, *of_rows, size) for size in sizes]
        source = self.source if self.source.whole is not None else cast("Source", _DecodedOnce(self.source))
        return [torch.from_numpy(render(self.recipe, source, *of_rows, size)) for size in sizes]

    def split(self, count: int) -> list[Batch]:
        """The batch as `count` ones of about equal size, in order, with what has been rendered of it."""
        bounds = [len(self) * place // count for place in range(count + 1)]
        return [self._rows(slice(start, stop)) for start, stop in itertools.pairwise(bounds) if stop > start]

    def share(self, part: Part) -> Batch:
        """One rank's rows."""
        return replace(self._rows(shares(len(self), part.count)[part.index]), whole=self)

    def _rows(self, rows: slice) -> Batch:
        rendered = {size: pixels[rows] for size, pixels in self.rendered.items()}
        return replace(self, samples=self.samples[rows], views=self.views[rows], rendered=rendered)

    def _labels_of(self, samples: Samples) -> Tensor:
        return torch.from_numpy(self.source.labels[samples]).to(self.device)

    def __len__(self) -> int:
        return len(self.samples)


class _DecodedOnce:
    """What rendering needs of a source of files: an image is decoded when first asked for, and kept."""

    whole = None

    def __init__(self, source: Source) -> None:
        self.channels = source.channels
        self._source = source
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def pixels(self, samples: Samples) -> list[NDArray[np.uint8]]:
        """Images `(H, W, channels)` of the given samples."""
        asked = samples.tolist()
        missing = [sample for sample in dict.fromkeys(asked) if sample not in self._kept]
        self._kept.update(zip(missing, self._source.pixels(np.array(missing, np.int64)), strict=True))
        return [self._kept[sample] for sample in asked]


def epoch_order(samples: Samples, *, seed: int, epoch: int, window: Window | None = None) -> Samples:
    """The samples in the order of an epoch: random, by seed, epoch and each sample's own draw alone.

    With a window, chunks come in random order and samples are mixed within a window of several chunks, so
    that only one window has to be in memory. The order is one for all teachers.
    """
    order = shuffled(samples, seed, epoch, Purpose.ORDER)
    if window is None:
        return order
    chunks = order // window.chunk_rows
    distinct = shuffled(np.unique(chunks), seed, epoch, Purpose.CHUNK_ORDER)
    rank = np.empty(int(distinct.max(initial=0)) + 1, dtype=np.int64)
    rank[distinct] = np.arange(len(distinct)) // window.chunks
    return order[np.argsort(rank[chunks], kind="stable")]


@dataclass(frozen=True)
class Window:
    """How much of a store is in memory at a time when it does not fit."""

    chunk_rows: int
    chunks: int

    @property
    def rows(self) -> int:
        """Samples that are mixed with each other."""
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
    """Batches of the samples in the order given; the last may be short.

    Args:
        source: where samples come from.
        recipe: how views are drawn.
        order: samples `(N,)`.
        views: with one view, every sample is seen under it. With several, a batch holds fewer samples, each
            under all of these views, and an image is decoded once for all of them.
        batch_size: rows (sample, view) of a batch, at least as many as there are views.
        device: where labels and pixels are given; None means the CPU.
        images: the source's whole images on the device, to render there.
        first: leave out this many batches, as after an interruption; nothing of them is drawn or rendered.
        part: take only this share of every batch's rows, as one of several ranks.

    Raises:
        ValueError: a batch is smaller than the number of views.
    """
    samples_per_batch = batch_size // len(views)
    if samples_per_batch < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least one row per view ({len(views)})")
    for start in range(first * samples_per_batch, len(order), samples_per_batch):
        chosen = order[start : start + samples_per_batch]
        rows = np.tile(chosen, len(views))
        of_rows = np.repeat(np.asarray(views, dtype=np.int64), len(chosen))
        batch = Batch(source, recipe, rows, of_rows, device or torch.device("cpu"), images)
        yield batch if part is None else batch.share(part)


def shares(rows: int, count: int) -> list[slice]:
    """Which rows of a batch each of several ranks has."""
    return [slice(rows * place // count, rows * (place + 1) // count) for place in range(count)]
