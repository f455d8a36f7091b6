"""Conversion of uint8 pixels to the size, channels and normalization that a network expects."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, model_validator

from coursepack.config import Config, parse_config
from coursepack.errors import RecipeError
from coursepack.kernels import normalize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


MAX_SIZE = 4096
"""Largest side of an image in pixels, as in view recipes."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the gray value (ITU-R 601)."""


class Preprocessing(Config):
    """Size and normalization of the images that a network expects."""

    size: Annotated[int, Field(ge=1, le=MAX_SIZE)]
    """Side in pixels at which views are rendered for the network."""
    mean: tuple[float, ...]
    """Means to subtract per channel, of values in [0, 1]."""
    std: tuple[Annotated[float, Field(gt=0)], ...]
    """Standard deviations to divide by per channel, of values in [0, 1]."""

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
        """Return a copy in which the given values replace its own.

        Raises:
            RecipeError: `mean` or `std` has another number of channels, or a value of `std` is not above 0.
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
        """Number of channels of the network's images, 1 or 3."""
        return len(self.mean)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Convert pixels `(N, H, W, C)` uint8 to normalized images `(N, channels, H, W)` float32.

        Gray pixels are repeated for a network with three channels; color pixels are converted to gray
        (ITU-R 601) for a network with one.
        """
        levels = self.levels(pixels.shape[3])
        if levels is None:
            images = pixels.permute(0, 3, 1, 2).float().div_(255)
            gray = (images * _luminance(pixels.device)).sum(1, keepdim=True)
            return ((gray - self.mean[0]) / self.std[0]).contiguous()
        channel, _ = levels
        return normalize(pixels, channel, _device_table(self.mean, self.std, pixels.device))

    def levels(self, given: int) -> tuple[list[int], Tensor] | None:
        """Return the normalization as a table lookup, or None if color pixels have to be converted to gray.

        Args:
            given: number of channels of the pixels.

        Returns:
            The index of the pixels' channel that each of the network's channels reads, and the normalized
            value of each pixel level, `(channels, 256)` float32.
        """
        if given == 3 and self.channels == 1:
            return None
        channel = [0] * self.channels if given == 1 else list(range(self.channels))
        return channel, _table(self.mean, self.std)


@functools.lru_cache
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return the normalized value of each pixel level `(channels, 256)`."""
    levels = torch.arange(256, dtype=torch.uint8).float().div_(255)
    return ((levels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).contiguous()


@functools.lru_cache
def _device_table(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `_table` on a device, so that it is copied there once and not for every batch."""
    return _table(mean, std).to(device)


@functools.lru_cache
def _luminance(device: torch.device) -> Tensor:
    """Return the weight of each color `(3, 1, 1)` on a device."""
    return torch.tensor(LUMINANCE, device=device)[:, None, None]
