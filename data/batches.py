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


def epoch_batches(
    source: Source,
    recipe: ViewRecipe,
    samples: Samples,
    *,
    view: int,
    epoch: int,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """One epoch, ordered by seed, epoch and each sample alone; the last batch may be short."""
    order = shuffled(samples, seed, epoch, Purpose.ORDER)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield Batch(source, recipe, chosen, np.full(len(chosen), view), device)


def plain_batches(
    source: Source,
    recipe: ViewRecipe,
    samples: Samples,
    *,
    view: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """The samples in their own order: for evaluation and for teachers."""
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        yield Batch(source, recipe, chosen, np.full(len(chosen), view), device)
