"""ShuffleNets for 32-pixel images: V1, Zhang et al. 2018 (arXiv 1707.01083); V2, Ma et al. 2018 (1807.11164).

These are the variants that distillation papers use since Tian et al. 2020 (arXiv 1910.10699): the stem is a
1x1 convolution without pooling after it, so that 32 pixels become 4. V1 has three groups, and ReLU after the
depthwise convolutions too. V2 has width 1. Neither paper describes the initial weights, so these are torch's
defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from coursepack.models.networks.layers import conv_bn, stage

if TYPE_CHECKING:
    from torch import Tensor

STEM = 24
"""Channels of the stem."""
GROUPS = 3
"""Groups of the 1x1 convolutions in V1."""


class ShuffleNetV1(nn.Module):
    """ShuffleNet V1: three layers of units with grouped 1x1 convolutions (table 1), and the head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, STEM, 1)
        self.layer1 = stage(_Unit, STEM, 240, 4, 2)
        self.layer2 = stage(_Unit, 240, 480, 8, 2)
        self.layer3 = stage(_Unit, 480, 960, 4, 2)
        self.head = nn.Linear(960, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 3, H, W)`."""
        maps = self.layer3(self.layer2(self.layer1(self.stem(images))))
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


class _Unit(nn.Module):
    """Unit of V1 (figure 2 b); at stride 2 the average-pooled input is concatenated (figure 2 c)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        new = channels_out - channels_in if stride == 2 else channels_out
        inner = new // 4
        # The stem has too few channels for groups (section 3.2).
        self.groups = 1 if channels_in == STEM else GROUPS
        self.reduce = conv_bn(channels_in, inner, 1, groups=self.groups)
        self.depthwise = conv_bn(inner, inner, 3, stride, groups=inner)
        self.expand = conv_bn(inner, new, 1, groups=GROUPS, relu=False)

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.channel_shuffle(self.reduce(maps), self.groups)
        new: Tensor = self.expand(self.depthwise(inner))
        if self.stride == 1:
            return F.relu(new + maps)
        return F.relu(torch.cat([new, F.avg_pool2d(maps, 3, 2, 1)], 1))


class ShuffleNetV2(nn.Module):
    """ShuffleNet V2: three layers of channel-splitting units (table 5), a convolution and the head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, STEM, 1)
        self.layer1 = stage(_split_unit, STEM, 116, 4, 2)
        self.layer2 = stage(_split_unit, 116, 232, 8, 2)
        self.layer3 = stage(_split_unit, 232, 464, 4, 2)
        self.tail = conv_bn(464, 1024, 1)
        self.head = nn.Linear(1024, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 3, H, W)`."""
        maps = self.tail(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


def _split_unit(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    return _SplitUnit(channels_out) if stride == 1 else _DownUnit(channels_in, channels_out)


class _SplitUnit(nn.Module):
    """Unit of V2 at stride 1 (figure 3 c): half of the channels skip the convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), conv_bn(half, half, 3, groups=half, relu=False), conv_bn(half, half, 1)
        )

    def forward(self, maps: Tensor) -> Tensor:
        kept, changed = maps.chunk(2, 1)
        return F.channel_shuffle(torch.cat([kept, self.branch(changed)], 1), 2)


class _DownUnit(nn.Module):
    """Unit of V2 at stride 2 (figure 3 d): both branches halve the size."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        half = channels_out // 2
        self.shortcut = nn.Sequential(
            conv_bn(channels_in, channels_in, 3, 2, groups=channels_in, relu=False),
            conv_bn(channels_in, half, 1),
        )
        self.branch = nn.Sequential(
            conv_bn(channels_in, half, 1),
            conv_bn(half, half, 3, 2, groups=half, relu=False),
            conv_bn(half, half, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return F.channel_shuffle(torch.cat([self.shortcut(maps), self.branch(maps)], 1), 2)
