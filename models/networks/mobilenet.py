"""MobileNetV2 for 32-pixel images: Sandler et al. 2018 (arXiv 1801.04381), table 2.

This is the variant that distillation papers use since Tian et al. 2020 (arXiv 1910.10699). It has half the
width, stride 1 in the second layer so that 32 pixels become 2, ReLU instead of ReLU6, no dropout, and 1,280
channels before the head for every width. The first layer also has a 1x1 convolution before the depthwise one,
although it does not expand the channels.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import nn

from coursepack.models.networks.layers import conv_bn, he_init, stage

if TYPE_CHECKING:
    from torch import Tensor

LAST = 1280
"""Input channels of the head."""


class MobileNetV2(nn.Module):
    """MobileNetV2: a convolution, seven layers of inverted residuals, a 1x1 convolution and the head."""

    def __init__(self, classes: int, *, width: float) -> None:
        """Build the network.

        Args:
            classes: number of classes C.
            width: factor of the channels of the stem and the seven layers.
        """
        super().__init__()
        channels = [int(full * width) for full in (32, 16, 24, 32, 64, 96, 160, 320)]
        wider = functools.partial(_InvertedResidual, expansion=6)
        self.stem = conv_bn(3, channels[0], 3, 2)
        self.layer1 = stage(_InvertedResidual, channels[0], channels[1], 1, 1)
        self.layer2 = stage(wider, channels[1], channels[2], 2, 1)
        self.layer3 = stage(wider, channels[2], channels[3], 3, 2)
        self.layer4 = stage(wider, channels[3], channels[4], 4, 2)
        self.layer5 = stage(wider, channels[4], channels[5], 3, 1)
        self.layer6 = stage(wider, channels[5], channels[6], 3, 2)
        self.layer7 = stage(wider, channels[6], channels[7], 1, 1)
        self.tail = conv_bn(channels[7], LAST, 1)
        self.head = nn.Linear(LAST, classes)
        he_init(self, head_std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 3, H, W)`."""
        maps = self.layer3(self.layer2(self.layer1(self.stem(images))))
        maps = self.tail(self.layer7(self.layer6(self.layer5(self.layer4(maps)))))
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


class _InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, 1x1 projection without ReLU; a shortcut if shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int = 1) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expand = conv_bn(channels_in, inner, 1)
        self.depthwise = conv_bn(inner, inner, 3, stride, groups=inner)
        self.project = conv_bn(inner, channels_out, 1, relu=False)
        self.same = stride == 1 and channels_in == channels_out

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(maps)))
        return maps + out if self.same else out
