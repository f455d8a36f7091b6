"""Interface of a hub: the functions that build and load the networks of one collection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from coursepack.models.preprocessing import Preprocessing


class HubNetwork(NamedTuple):
    """A network as its hub returns it."""

    module: nn.Module
    preprocessing: Preprocessing | None
    """Size and normalization that the network expects; None if the hub does not know them."""
    classes: int
    """Number of classes C that the network outputs."""


@dataclass(frozen=True)
class Hub:
    """A collection of networks, addressed by specs of the form `PREFIX:NAME`."""

    form: str
    """Form of the hub's specs for error messages, such as `timm:NAME`."""
    build: Callable[[str, int, int | None], HubNetwork]
    """Builds a network with fresh weights: `build(name, classes, size)`.

    `size` is the side of the images in pixels, for networks that are built for a fixed size; None selects the
    network's default. The random numbers come from torch's default generator, which the caller seeds.
    """
    load: Callable[[str, str, int], HubNetwork | None] | None = None
    """Loads a network with weights that have a name instead of a file: `load(name, weights, classes)`.

    Returns None for weights that the hub does not know. None if the hub has no named weights.
    """
    weights_help: str = ""
    """Description of the named weights, appended to `--weights FILE` in error messages."""
    unused_weights: tuple[str, ...] = ()
    """Prefixes of tensors in weight files that are ignored because the networks built here lack them."""
    check_output: bool = False
    """True if the shape of a built network's logits is checked by running it once."""
