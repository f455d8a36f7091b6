"""Mixup and cutmix with partners drawn from the whole split instead of the batch.

A partner is any sample of the split with equal probability, rendered under the same view without being mixed
itself. The stored target is the teacher's output for the mixed image; the hard label becomes two labels with
a share each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from coursepack.config import Config
from coursepack.data import exact
from coursepack.data.randomness import below, chance
from coursepack.data.views.geometry import Probability
from coursepack.data.views.params import CUTMIX, GRID, MIXUP, NO_MIX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coursepack.data.randomness import Draws, Samples

Alpha = Annotated[float, Field(ge=0, le=1)]

ATTEMPTS = 32
"""Maximum number of attempts per beta-distributed draw; each succeeds with probability at least one half."""


class Mix(Config):
    """Configuration of mixup and cutmix."""

    mixup_alpha: Alpha = 0.0
    """Both parameters of the beta distribution of mixup's share (Zhang et al. 2018); 0 disables mixup."""
    cutmix_alpha: Alpha = 0.0
    """Both parameters of the beta distribution of cutmix's share (Yun et al. 2019); 0 disables cutmix."""
    cutmix_probability: Probability = 0.5
    """Probability of cutmix rather than mixup if both are enabled."""
    probability: Probability = 1.0
    """Probability that an image is mixed at all."""

    @model_validator(mode="after")
    def _check_enabled(self) -> Mix:
        if self.mixup_alpha == self.cutmix_alpha == 0:
            raise ValueError("mixup_alpha and cutmix_alpha are both 0: leave mix out, or set one of them")
        return self

    def draw(
        self, draws: Draws, population: int
    ) -> tuple[NDArray[np.uint8], Samples, NDArray[np.int32], NDArray[np.int32]]:
        """Return kinds, partners, shares and boxes, defined as in `Mixing`.

        Args:
            draws: random words.
            population: number of samples in the split.
        """
        words = draws.words(0)
        cutmix_probability = self.cutmix_probability
        if 0 in (self.mixup_alpha, self.cutmix_alpha):
            cutmix_probability = float(self.cutmix_alpha > 0)
        cut = chance(words[:, 1], cutmix_probability)
        kinds = np.where(cut, CUTMIX, MIXUP).astype(np.uint8)
        kinds[~chance(words[:, 0], self.probability)] = NO_MIX
        partners = np.where(kinds == NO_MIX, draws.samples, below(words[:, 2], population))
        alphas = np.where(cut, self.cutmix_alpha, self.mixup_alpha)
        shares = np.where(kinds == NO_MIX, GRID, np.rint(_beta(draws, alphas) * GRID).astype(np.int64))
        boxes = _cut_boxes(draws, shares)
        boxes[kinds != CUTMIX] = 0
        area = boxes[:, 2].astype(np.int64) * boxes[:, 3]
        # The label's share follows the area of the clipped box.
        shares = np.where(kinds == CUTMIX, GRID - (area + GRID // 2) // GRID, shares)
        return kinds, partners, shares.astype(np.int32), boxes


def _beta(draws: Draws, alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw from Beta(a, a) for 0 < a <= 1 by Jöhnk's method (1964)."""
    result = np.full(len(alphas), 0.5)
    pending = np.flatnonzero(alphas > 0)
    for attempt in range(ATTEMPTS):
        words = draws.select(pending).words(2 + attempt)
        powers = exact.log((words[:, :2].astype(np.float64) + 0.5) / 2.0**32) / alphas[pending, None]
        # Computed in logarithms, relative to the larger one, because small powers would underflow.
        largest = powers.max(axis=1)
        first, second = exact.exp(np.maximum(powers - largest[:, None], -700.0)).T
        fits = first + second <= exact.exp(np.minimum(-largest, 700.0))
        result[pending[fits]] = (first / (first + second))[fits]
        pending = pending[~fits]
        if len(pending) == 0:
            break
    return result


def _cut_boxes(draws: Draws, shares: NDArray[np.int64]) -> NDArray[np.int32]:
    """Draw a box of area 1 - share around a uniformly distributed center, clipped at the borders."""
    middle = below(draws.words(1)[:, :2], GRID)
    half = np.rint(np.sqrt((GRID - shares) / GRID) * (GRID / 2)).astype(np.int64)[:, None]
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half, GRID)
    return np.concatenate([low, high - low], axis=1).astype(np.int32)
