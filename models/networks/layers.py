"""Layers and weight initialization shared by the networks for 32-pixel images."""

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
    """Return a convolution with batch normalization and ReLU.

    Args:
        channels_in: input channels.
        channels_out: output channels.
        side: kernel size, odd; padding keeps the size of maps at stride 1.
        stride: stride of the convolution.
        groups: groups of the convolution.
        bias: give the convolution a bias.
        relu: append a ReLU.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, side, stride, side // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(channels_out),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


def stage(
    block: Callable[[int, int, int], nn.Module], channels_in: int, channels_out: int, count: int, stride: int
) -> nn.Sequential:
    """Return a sequence of blocks, of which only the first changes the channels and the size.

    Args:
        block: builds a block from input channels, output channels and stride.
        channels_in: input channels of the first block.
        channels_out: output channels of all blocks.
        count: number of blocks.
        stride: stride of the first block; the others have stride 1.
    """
    first = block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(block(channels_out, channels_out, 1) for _ in range(count - 1)))


def he_init(network: nn.Module, head_std: float | None = None) -> None:
    """Initialize convolutions from N(0, 2 / (k² output channels)) and set biases to zero, in place.

    He et al. 2015 (arXiv 1502.01852), section 2.2, backward case.

    Args:
        network: network to initialize.
        head_std: standard deviation of the weights of linear layers; None keeps torch's initialization.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear) and head_std is not None:
            nn.init.normal_(layer.weight, std=head_std)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
