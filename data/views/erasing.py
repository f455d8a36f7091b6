"""Random erasing: overwrites a box of a rendered image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from coursepack.config import Config
from coursepack.data.randomness import chance
from coursepack.data.views.geometry import Probability, random_boxes
from coursepack.data.views.params import GRID
from coursepack.data.views.pixel_ops import Range, scaled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Draws

NOISE_STREAM = 100
"""Stream of the noise, beyond the streams of a box's attempts."""


class RandomErasing(Config):
    """Overwrite a box of random area and aspect ratio (Zhong et al. 2020), in uint8, before normalization."""

    op: Literal["random_erasing"] = "random_erasing"
    probability: Probability = 0.5
    scale: Range = (0.02, 0.33)
    """Smallest and largest area, as shares of the image's area."""
    ratio: Range = (0.3, 3.3)
    """Smallest and largest height / width."""
    value: Annotated[int, Field(ge=0, le=255)] | Literal["noise"] = 0
    """Value of all channels, or `noise`: values uniformly distributed from 0 to 255, drawn per pixel."""

    @model_validator(mode="after")
    def _ranges(self) -> RandomErasing:
        if not 0 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}, expected 0 <= smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}, expected 0 < smallest <= largest")
        return self

    def draw(self, draws: Draws, reference_size: int) -> NDArray[np.int32]:
        """Draw top, left, height, width in 2**-16 (height 0: no erasing) and, for noise, its two-word key."""
        taken = chance(draws.words(NOISE_STREAM)[:, 0], self.probability)
        sides = np.full((len(taken), 2), reference_size, dtype=np.int64)
        # `random_boxes` takes width / height, `ratio` is height / width.
        start, length = random_boxes(
            draws, sides, self.scale, (1 / self.ratio[1], 1 / self.ratio[0]), smaller=True
        )
        low, high = start * GRID // reference_size, (start + length) * GRID // reference_size
        box = np.concatenate([low, high - low], axis=1).astype(np.int32) * taken[:, None]
        key = draws.words(NOISE_STREAM)[:, 2:].view(np.int32)
        return np.concatenate([box, key], axis=1).astype(np.int32) if self.value == "noise" else box

    def apply(self, image: Tensor, params: Sequence[int], reference_size: int) -> Tensor:
        """Overwrite the box of one image `(C, S, S)` uint8; its edges are rounded to whole pixels."""
        import torch

        top, left, height, width, *key = params
        size = image.shape[-1]
        rows = slice(scaled(top, size, GRID), scaled(top + height, size, GRID))
        across = slice(scaled(left, size, GRID), scaled(left + width, size, GRID))
        if rows.start == rows.stop or across.start == across.stop:
            return image
        image = image.clone()
        if self.value == "noise":
            shape = (len(image), rows.stop - rows.start, across.stop - across.start)
            image[:, rows, across] = torch.from_numpy(_noise(key, shape)).to(image.device)
        else:
            image[:, rows, across] = self.value
        return image


def _noise(key: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Draw uniformly distributed bytes under a key of two words."""
    from coursepack.data.randomness import random_words

    low, high = (int(word) & 0xFFFFFFFF for word in key)
    count = -(-int(np.prod(shape)) // 16)
    words = random_words(low | high << 32, np.arange(count), 0, 0)
    return words.astype("<u4").view(np.uint8).reshape(-1)[: np.prod(shape)].reshape(shape).copy()
