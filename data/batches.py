"""Batches: which samples, which view, their labels, and their pixels at any size that is asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from coursepack.data.randomness import Purpose, shuffled
from coursepack.data.views import draw, render

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from coursepack.data.randomness import Samples
    from coursepack.data.sources import Source
    from coursepack.data.views import ViewRecipe


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
    _pixels: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def labels(self) -> Tensor:
        """Class ids `(N,)` int64."""
        return torch.from_numpy(self.source.labels[self.samples]).to(self.device)

    @functools.cached_property
    def view(self) -> int | Samples:
        """The view that all samples share, or each sample's own."""
        first = int(self.views[0]) if len(self.views) else 0
        return first if bool((self.views == first).all()) else self.views

    def pixels(self, size: int) -> Tensor:
        """Rendered views `(N, size, size, channels)` uint8; rendered once per size."""
        if size not in self._pixels:
            self._pixels[size] = torch.from_numpy(self._render(size)).to(self.device)
        return self._pixels[size]

    def _render(self, size: int) -> np.ndarray:
        out = np.empty((len(self.samples), size, size, self.source.channels), dtype=np.uint8)
        for view in np.unique(self.views):
            rows = np.flatnonzero(self.views == view)
            params = draw(self.recipe, self.samples[rows], int(view))
            out[rows] = render(self.source, self.samples[rows], params, size)
        return out

    def __len__(self) -> int:
        return len(self.samples)


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
    view: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of the samples in the order given; the last may be short."""
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield Batch(source, recipe, chosen, np.full(len(chosen), view), device)
