"""Wide residual networks: Zagoruyko and Komodakis 2016 (arXiv 1605.07146), table 1, B(3,3), no dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

from coursepack.models.networks.layers import he_init, stage

if TYPE_CHECKING:
    from torch import Tensor


class WideResNet(nn.Module):
    """Wide residual network of depth 6n + 4; `factor` multiplies the channels 16, 32 and 64 of its layers."""

    def __init__(self, classes: int, *, depth: int, factor: int) -> None:
        super().__init__()
        count = (depth - 4) // 6
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = stage(_Block, 16, 16 * factor, count, 1)
        self.layer2 = stage(_Block, 16 * factor, 32 * factor, count, 2)
        self.layer3 = stage(_Block, 32 * factor, 64 * factor, count, 2)
        self.norm = nn.BatchNorm2d(64 * factor)
        self.head = nn.Linear(64 * factor, classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 3, H, W)`."""
        maps = self.norm(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        out: Tensor = self.head(F.relu(maps).mean((2, 3)))
        return out


class _Block(nn.Module):
    """Block of twice BN, ReLU and convolution; a shortcut convolution takes the output of the first ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = F.relu(self.bn1(maps))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (maps if self.shortcut is None else self.shortcut(active))
