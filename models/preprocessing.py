"""From uint8 pixels to what a network wants: its own size, channels and normalisation."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, model_validator

from coursepack.config import Config, parse_config
from coursepack.errors import RecipeError
from coursepack.kernels import normalise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


MOST_SIZE = 4096
"""Of an image's side in pixels, as in view recipes."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R 601)."""


class Preprocessing(Config):
    """What a network expects of its images."""

    size: Annotated[int, Field(ge=1, le=MOST_SIZE)]
    """Side in pixels at which views are rendered for it."""
    mean: tuple[float, ...]
    """Subtracted per channel, of values in [0, 1]."""
    std: tuple[Annotated[float, Field(gt=0)], ...]
    """Divided by, per channel."""

    @model_validator(mode="after")
    def _check_channels(self) -> Preprocessing:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean has {len(self.mean)} values and std {len(self.std)}, expected 1 or 3 of each, "
                "one per channel"
            )
        return self

    def changed(
        self, size: int | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Preprocessing:
        """This with what is given in the place of its own.

        Raises:
            RecipeError: means or standard deviations for another number of channels, or not numbers above 0.
        """
        given = {"size": size, "mean": mean, "std": std}
        values = self.model_dump() | {key: value for key, value in given.items() if value is not None}
        changed = parse_config(Preprocessing, values, "the preprocessing")
        if changed.channels != self.channels:
            raise RecipeError(
                f"the network reads {self.channels} channels, but mean and std are given for "
                f"{changed.channels}: give one value per channel"
            )
        return changed

    @property
    def channels(self) -> int:
        """Channels the network reads."""
        return len(self.mean)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised images `(N, channels, H, W)` float32 from pixels `(N, H, W, C)` uint8.

        Grey pixels are repeated for a network of three channels; colours become grey (ITU-R 601) for a
        network of one.
        """
        levels = self.levels(pixels.shape[3])
        if levels is None:
            images = pixels.permute(0, 3, 1, 2).float().div_(255)
            grey = (images * images.new_tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
            return ((grey - self.mean[0]) / self.std[0]).contiguous()
        return normalise(pixels, *levels)

    def levels(self, given: int) -> tuple[list[int], Tensor] | None:
        """Which channel of the pixels each of the network's reads, and the value of each level there.

        The table is `(channels, 256)` float32. None for a network of one channel that is given colours.
        """
        if given == 3 and self.channels == 1:
            return None
        channel = [0] * self.channels if given == 1 else list(range(self.channels))
        return channel, _table(self.mean, self.std)


@functools.lru_cache
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised value of each level `(channels, 256)`."""
    levels = torch.arange(256, dtype=torch.uint8).float().div_(255)
    return ((levels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).contiguous()
