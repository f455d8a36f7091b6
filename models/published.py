"""Names of weights in other repositories' definitions of the networks defined here.

RepDistiller (Tian et al. 2020, arXiv 1910.10699) published teachers for CIFAR-100, and mdistiller (Zhao et
al. 2022, arXiv 2203.08679) and later work have the same definitions. Their architectures are those of
`models.networks`; only the names differ.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from coursepack.console import inform
from coursepack.models.networks.mobilenet import MobileNetV2
from coursepack.models.networks.resnet import ResNet
from coursepack.models.networks.shufflenet import ShuffleNetV1, ShuffleNetV2
from coursepack.models.networks.vgg import VGG
from coursepack.models.networks.wide_resnet import WideResNet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    Rename = str | Callable[[re.Match[str]], str]
    """Replacement of a pattern, as for `re.sub`."""


def _vgg(match: re.Match[str]) -> str:
    """Blocks list convolution, normalization and ReLU one after the other."""
    block, position = int(match[1]), int(match[2])
    return f"layer{block + 1}.{position // 3}.{position % 3}."


def _mobilenet(match: re.Match[str]) -> str:
    """Units list three convolutions, each with its normalization and ReLU, but for the last ReLU."""
    position = int(match[3])
    part = ("expand", "depthwise", "project")[position // 3]
    return f"layer{int(match[1]) + 1}.{match[2]}.{part}.{position % 3}."


def _shuffle_v1(match: re.Match[str]) -> str:
    part = ("reduce", "depthwise", "expand")[int(match[3]) - 1]
    return f"{match[1]}{part}.{KINDS[match[2]]}."


def _shuffle_v2(match: re.Match[str]) -> str:
    """First units list the shortcut's two convolutions before the branch's three; others have no shortcut."""
    branch, number = "branch", int(match[4]) - 1
    if match[2] == "0":
        branch, number = ("shortcut", number) if number < 2 else (branch, number - 2)
    return f"{match[1]}{match[2]}.{branch}.{number}.{KINDS[match[3]]}."


KINDS = {"conv": 0, "bn": 1}
"""Position in `conv_bn` of a convolution and of its normalization."""
_STEM = ((r"^conv1\.", "stem.0."), (r"^bn1\.", "stem.1."))
PUBLISHED: dict[type[nn.Module], tuple[tuple[str, Rename], ...]] = {
    ResNet: (*_STEM, (r"\.downsample\.", ".shortcut."), (r"^fc\.", "head.")),
    WideResNet: (
        (r"^conv1\.", "stem."),
        (r"^bn1\.", "norm."),
        (r"^block(\d)\.layer\.", r"layer\1."),
        (r"\.convShortcut\.", ".shortcut."),
        (r"^fc\.", "head."),
    ),
    VGG: ((r"^block(\d)\.(\d+)\.", _vgg), (r"^classifier\.", "head.")),
    MobileNetV2: (
        (r"^conv1\.", "stem."),
        (r"^conv2\.", "tail."),
        (r"^blocks\.(\d)\.(\d)\.conv\.(\d)\.", _mobilenet),
        (r"^classifier\.0\.", "head."),
    ),
    ShuffleNetV1: (
        *_STEM,
        (r"^(layer\d\.\d\.)(conv|bn)(\d)\.", _shuffle_v1),
        (r"^linear\.", "head."),
    ),
    ShuffleNetV2: (
        *_STEM,
        (r"^conv2\.", "tail.0."),
        (r"^bn2\.", "tail.1."),
        (r"^(layer\d\.)(\d)\.(conv|bn)(\d)\.", _shuffle_v2),
        (r"^linear\.", "head."),
    ),
}
"""Patterns in published names and what they are here, by the class of the network."""


def from_published(state: Mapping[str, Tensor], module: nn.Module, where: str) -> Mapping[str, Tensor]:
    """Rename weights that have the names of RepDistiller's and mdistiller's networks.

    Args:
        state: weights by name.
        module: the network.
        where: file of the weights, for the message on stderr.

    Returns:
        The weights by the network's own names; `state` itself if it does not have exactly the published ones.
    """
    own, rules = module.state_dict().keys(), PUBLISHED.get(type(module))
    if rules is None or state.keys() == own:
        return state
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            found, count = re.subn(pattern, replacement, name)
            if count:
                name = found
        renamed[name] = value
    if renamed.keys() != own:
        return state
    kind = type(module).__name__
    inform(f"{where}: mapped {len(renamed)} names of RepDistiller's and mdistiller's {kind} to those here")
    return renamed
