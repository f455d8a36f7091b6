"""VGG for 32-pixel images: the convolutions of Simonyan and Zisserman 2015 (arXiv 1409.1556), table 1.

These are the variants that distillation papers use: batch normalization after each convolution, which keeps
its bias, and one linear layer on the mean over positions instead of three linear layers. Images of 64 pixels
and more are pooled four times, smaller ones three times: 32 pixels become 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

from coursepack.models.networks.layers import conv_bn, he_init

if TYPE_CHECKING:
    from torch import Tensor

CHANNELS = (64, 128, 256, 512, 512)
"""Channels of each layer."""


class VGG(nn.Module):
    """VGG: five layers of 3x3 convolutions, and the head."""

    def __init__(self, classes: int, *, counts: tuple[int, int, int, int, int]) -> None:
        """Build the network.

        Args:
            classes: number of classes C.
            counts: number of convolutions in each of the five layers.
        """
        super().__init__()
        before = (3, *CHANNELS)
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = (
            nn.Sequential(
                conv_bn(channels_in, channels_out, bias=True),
                *(conv_bn(channels_out, channels_out, bias=True) for _ in range(count - 1)),
            )
            for channels_in, channels_out, count in zip(before, CHANNELS, counts, strict=False)
        )
        self.head = nn.Linear(CHANNELS[-1], classes)
        he_init(self, head_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 3, H, W)`."""
        maps = self.layer1(images)
        for layer in (self.layer2, self.layer3, self.layer4):
            maps = layer(F.max_pool2d(maps, 2))
        if images.shape[2] >= 64:
            maps = F.max_pool2d(maps, 2)
        out: Tensor = self.head(self.layer5(maps).mean((2, 3)))
        return out
