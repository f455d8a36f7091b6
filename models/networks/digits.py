"""Small networks for 8x8 gray images of digits, with different sizes and architectures."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsSmall(nn.Module):
    """Multilayer perceptron 64-64-C with 4,810 parameters for ten classes, meant as a student."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 1, 8, 8)`."""
        out: Tensor = self.head(F.relu(self.hidden(images.flatten(1))))
        return out


class DigitsMLP(nn.Module):
    """Multilayer perceptron 64-256-128-C."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(64, 256)
        self.hidden2 = nn.Linear(256, 128)
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 1, 8, 8)`."""
        hidden = F.relu(self.hidden1(images.flatten(1)))
        out: Tensor = self.head(F.relu(self.hidden2(hidden)))
        return out


class DigitsCNN(nn.Module):
    """LeNet-like network of two convolutions with pooling and one hidden layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 2 * 2, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 1, 8, 8)`."""
        maps = F.max_pool2d(F.relu(self.conv1(images)), 2)
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)
        out: Tensor = self.head(F.relu(self.hidden(maps.flatten(1))))
        return out


class DigitsResNet(nn.Module):
    """Residual network of four blocks with batch normalization and global average pooling."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(_Residual(32, 32, 1), _Residual(32, 32, 1))
        self.layer2 = nn.Sequential(_Residual(32, 64, 2), _Residual(64, 64, 1))
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)` for images `(N, 1, 8, 8)`."""
        maps = self.layer2(self.layer1(self.stem(images)))
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


class _Residual(nn.Module):
    """Pre-activation block: twice BN, ReLU and convolution, plus a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.conv1(F.relu(self.bn1(maps)))
        out: Tensor = self.conv2(F.relu(self.bn2(inner))) + self.shortcut(maps)
        return out
