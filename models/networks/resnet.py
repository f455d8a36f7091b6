"""Residual networks for 32-pixel images: He et al. 2016 (arXiv 1512.03385), section 4.2.

These are the variants that distillation papers use since Tian et al. 2020 (arXiv 1910.10699): the shortcut of
a block that changes the shape is a 1x1 convolution with batch normalization (option B of section 3.3) instead
of padding with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

from coursepack.models.networks.layers import conv_bn, he_init, stage

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (16, 16, 32, 64)
"""Channels of the stem and of the three layers."""
WIDE = (32, 64, 128, 256)
"""Channels of the `x4` networks: twice as many in the stem, four times as many in the layers."""


class ResNet(nn.Module):
    """Residual network of depth 6n + 2: a convolution, three layers of n blocks, and the head."""

    def __init__(self, classes: int, *, depth: int, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.stem = conv_bn(3, widths[0])
        self.layer1 = stage(_Block, widths[0], widths[1], count, 1)
        self.layer2 = stage(_Block, widths[1], widths[2], count, 2)
        self.layer3 = stage(_Block, widths[2], widths[3], count, 2)
        self.head = nn.Linear(widths[3], classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 3, H, W)`."""
        maps = self.layer3(self.layer2(self.layer1(self.stem(images))))
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


class _Block(nn.Module):
    """Residual block of two convolutions with BN; ReLU after the first and after adding the shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else conv_bn(channels_in, channels_out, 1, stride, relu=False)

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(maps))
