"""From uint8 pixels to what a network wants: its own size, channels and normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from coursepack.config import Config

if TYPE_CHECKING:
    from torch import Tensor


class Preprocessing(Config):
    """What a network expects of its images."""

    size: Annotated[int, Field(ge=1)]
    """Side in pixels at which views are rendered for it."""
    mean: tuple[float, ...]
    """Subtracted per channel, of values in [0, 1]."""
    std: tuple[float, ...]
    """Divided by, per channel."""

    @property
    def channels(self) -> int:
        """Channels the network reads."""
        return len(self.mean)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised images `(N, channels, H, W)` float32 from pixels `(N, H, W, C)` uint8.

        Grey pixels are repeated for a network of three channels; colours become grey (ITU-R 601) for a
        network of one.
        """
        images = pixels.permute(0, 3, 1, 2).float().div_(255)
        if images.shape[1] == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        elif images.shape[1] == 3 and self.channels == 1:
            images = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return ((images - mean) / std).contiguous()
