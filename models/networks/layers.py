"""What several families of networks for 32-pixel images are made of, and their initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


def conv_bn(
    channels_in: int,
    channels_out: int,
    side: int = 3,
    stride: int = 1,
    *,
    groups: int = 1,
    bias: bool = False,
    relu: bool = True,
) -> nn.Sequential:
    """A convolution that keeps the size of maps at stride 1, batch normalisation, and ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, side, stride, side // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(channels_out),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def stage(
    block: Callable[[int, int, int], nn.Module], channels_in: int, channels_out: int, count: int, stride: int
) -> nn.Sequential:
    """`count` blocks, made from channels in, channels out and stride; the first alone changes the shape."""
    first = block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(block(channels_out, channels_out, 1) for _ in range(count - 1)))


def he_init(network: nn.Module, head_std: float | None = None) -> None:
    """Draw weights of convolutions from N(0, 2 / (k² channels out)), and set biases to zero.

    He et al. 2015 (arXiv 1502.01852), the backward case of section 2.2.

    Args:
        network: changed in place.
        head_std: standard deviation of linear layers' weights; None leaves them as torch drew them.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear) and head_std is not None:
            nn.init.normal_(layer.weight, std=head_std)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
