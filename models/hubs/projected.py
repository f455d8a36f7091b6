"""Networks that classify with another network's head: `projected:NETWORK:layer=LAYER,map=CxHxW,...`.

A projector maps the output of one layer to the features that the head reads, and the head, which is never
trained, classifies their mean over positions. `distill train --method simkd` builds such networks from a
student, a teacher's stored head and a stored map (Chen et al., CVPR 2022, arXiv 2203.14001). The spec has
everything that determines the architecture, so that run folders and stores need nothing else; the weights of
the head are saved with the others.

    projected:digits-cnn:layer=conv2,map=32x2x2,width=32,features=64
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from coursepack.errors import RecipeError, suggestion
from coursepack.imports import PROJECTED
from coursepack.models.networks.layers import conv_bn
from coursepack.models.taps import tapped

if TYPE_CHECKING:
    from torch import Tensor

    from coursepack.models.build import Network
    from coursepack.models.hubs.base import HubNetwork

FORM = f"{PROJECTED}:NETWORK:layer=LAYER,map=CxHxW,width=W,features=D"
PROJECTOR = "projector"
"""Name of the layer whose output, `(N, D, H, W)`, the head averages and classifies."""
MOST = 1 << 16
"""Upper bound of all numbers in a spec."""


@dataclass(frozen=True)
class Projection:
    """The layer that is projected, and the sizes of the projector."""

    layer: str
    """Name of the layer in the wrapped network."""
    map: tuple[int, int, int]
    """Channels of the layer's output, and the height and width to which it is average-pooled."""
    width: int
    """Channels between the projector's convolutions."""
    features: int
    """Number of features D that the head reads."""

    def spec(self, network: str) -> str:
        """Return the spec of a network wrapped in this projection."""
        values = {
            "layer": self.layer,
            "map": "x".join(map(str, self.map)),
            "width": self.width,
            "features": self.features,
        }
        text = ",".join(f"{name}={value}" for name, value in values.items())
        return f"{PROJECTED}:{network}:{text}"


class Projected(nn.Module):
    """Network without its own head, projector, and a head with frozen weights."""

    def __init__(self, network: nn.Module, projection: Projection, classes: int) -> None:
        """Wrap a network, whose own head is removed in place."""
        super().__init__()
        channels, height, width = projection.map
        self.layer, self.size = projection.layer, (height, width)
        self.student = _without_head(network, classes)
        self.projector = nn.Sequential(
            conv_bn(channels, projection.width, 1),
            conv_bn(projection.width, projection.width, 3),
            conv_bn(projection.width, projection.features, 1),
        )
        self.head = nn.Linear(projection.features, classes).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, classes)`; the gradient passes through the head and does not reach it."""
        with tapped(self.student, [self.layer]) as outputs:
            self.student(images)
        maps = self.projector(F.adaptive_avg_pool2d(outputs[self.layer], self.size))
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


def _without_head(network: nn.Module, classes: int) -> nn.Module:
    """Replace the last linear layer by the identity if it is the classifier, since nothing would train it."""
    linear = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if linear and linear[-1][0] and linear[-1][1].out_features == classes:
        network.set_submodule(linear[-1][0], nn.Identity())
    return network


def project(
    student: Network, projection: Projection, head_weight: Tensor, head_bias: Tensor, *, seed: int
) -> Network:
    """Wrap a student, whose own head is removed in place.

    Args:
        student: the network to wrap.
        projection: the layer that is projected, and the sizes of the projector.
        head_weight: weight of the frozen head, `(C, D)`.
        head_bias: bias of the frozen head, `(C,)`.
        seed: seed of the projector's initial weights.
    """
    from coursepack.models.build import seeded  # which itself imports the hubs

    with seeded(seed):
        module = Projected(student.module, projection, student.classes)
    with torch.no_grad():
        module.head.weight.copy_(head_weight)
        module.head.bias.copy_(head_bias)
    return replace(student, spec=projection.spec(student.spec), module=module)


def build(name: str, classes: int, size: int | None) -> HubNetwork:
    """Build a wrapped network with fresh weights, its head included.

    Args:
        name: spec of the network to wrap, a colon, and the projection.
        classes: number of classes C.
        size: side of the images in pixels, passed on to the wrapped network.

    Raises:
        RecipeError: the name has another form, or the wrapped network does not have the layer.
        UnknownName: there is no such network to wrap.
    """
    from coursepack.models.build import build_fresh  # which itself imports the hubs

    inner, projection = parse(name)
    built = build_fresh(inner, classes, size)
    layers = [layer for layer, _ in built.module.named_modules()]
    if projection.layer not in layers:
        near = suggestion(projection.layer, layers)
        raise RecipeError(f"network {inner!r} has no layer {projection.layer!r} to project.{near}")
    return built._replace(module=Projected(built.module, projection, classes))


def parse(name: str) -> tuple[str, Projection]:
    """Return the spec of the wrapped network, and the projection.

    >>> parse("digits-cnn:layer=conv2,map=32x2x2,width=32,features=64")
    ('digits-cnn', Projection(layer='conv2', map=(32, 2, 2), width=32, features=64))

    Raises:
        RecipeError: the name has another form.
    """
    inner, _, text = name.rpartition(":")
    values = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        if list(values) != ["layer", "map", "width", "features"] or inner.startswith(f"{PROJECTED}:"):
            raise ValueError
        channels, height, width = map(_positive, values["map"].split("x"))
        sizes = (channels, height, width), _positive(values["width"]), _positive(values["features"])
    except ValueError as error:
        raise RecipeError(f"network '{PROJECTED}:{name:.200}' is not {FORM}") from error
    return inner, Projection(values["layer"], *sizes)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) <= len(str(MOST)) else 0
    if not 1 <= number <= MOST:
        raise ValueError
    return number
