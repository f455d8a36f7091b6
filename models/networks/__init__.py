"""Networks defined in this package, by name, each with its preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from coursepack.models.networks.digits import DigitsCNN, DigitsMLP, DigitsResNet, DigitsSmall
from coursepack.models.networks.mobilenet import MobileNetV2
from coursepack.models.networks.resnet import WIDE, ResNet
from coursepack.models.networks.shufflenet import ShuffleNetV1, ShuffleNetV2
from coursepack.models.networks.vgg import VGG
from coursepack.models.networks.wide_resnet import WideResNet
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

DIGITS = Preprocessing(size=8, mean=(0.3,), std=(0.37,))
"""Size, mean and standard deviation of the digits that scikit-learn ships."""
CIFAR = Preprocessing(size=32, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
"""Size of CIFAR images, and means and standard deviations of CIFAR-100's training pixels."""


@dataclass(frozen=True)
class NetworkKind:
    """Constructor and preprocessing of a named network."""

    build: Callable[[int], nn.Module]
    """Builds the network for a number of classes."""
    preprocessing: Preprocessing


NETWORKS = {
    "digits-small": NetworkKind(DigitsSmall, DIGITS),
    "digits-mlp": NetworkKind(DigitsMLP, DIGITS),
    "digits-cnn": NetworkKind(DigitsCNN, DIGITS),
    "digits-resnet": NetworkKind(DigitsResNet, DIGITS),
    "resnet8": NetworkKind(partial(ResNet, depth=8), CIFAR),
    "resnet14": NetworkKind(partial(ResNet, depth=14), CIFAR),
    "resnet20": NetworkKind(partial(ResNet, depth=20), CIFAR),
    "resnet32": NetworkKind(partial(ResNet, depth=32), CIFAR),
    "resnet44": NetworkKind(partial(ResNet, depth=44), CIFAR),
    "resnet56": NetworkKind(partial(ResNet, depth=56), CIFAR),
    "resnet110": NetworkKind(partial(ResNet, depth=110), CIFAR),
    "resnet8x4": NetworkKind(partial(ResNet, depth=8, widths=WIDE), CIFAR),
    "resnet32x4": NetworkKind(partial(ResNet, depth=32, widths=WIDE), CIFAR),
    "wrn-16-1": NetworkKind(partial(WideResNet, depth=16, factor=1), CIFAR),
    "wrn-16-2": NetworkKind(partial(WideResNet, depth=16, factor=2), CIFAR),
    "wrn-40-1": NetworkKind(partial(WideResNet, depth=40, factor=1), CIFAR),
    "wrn-40-2": NetworkKind(partial(WideResNet, depth=40, factor=2), CIFAR),
    "vgg8": NetworkKind(partial(VGG, counts=(1, 1, 1, 1, 1)), CIFAR),
    "vgg11": NetworkKind(partial(VGG, counts=(1, 1, 2, 2, 2)), CIFAR),
    "vgg13": NetworkKind(partial(VGG, counts=(2, 2, 2, 2, 2)), CIFAR),
    "mobilenet-v2": NetworkKind(partial(MobileNetV2, width=0.5), CIFAR),
    "shufflenet-v1": NetworkKind(ShuffleNetV1, CIFAR),
    "shufflenet-v2": NetworkKind(ShuffleNetV2, CIFAR),
}
"""Networks by name."""
