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
    class_names: tuple[str, ...] | None = None
    """Names of the classes, if the hub records them."""
    spec: str | None = None
    """Spec of the architecture, without paths; None if it is the one that the network was requested by."""
    settings: str | None = None
    """Fingerprint of the configuration that determines outputs beside `spec` and weights, if there is one."""
    origin: str | None = None
    """Spec that loads the network again, with path or commit, if it has its own weights."""
    library: str | None = None
    """Name and version of the library that runs the network, if the hub depends on one."""
    size: int | None = None
    """Side in pixels of the images, if the hub knows that but not the normalization."""


@dataclass(frozen=True)
class Hub:
    """A collection of networks, addressed by specs of the form `PREFIX:NAME`."""

    form: str
    """Form of the hub's specs for error messages, such as `timm:NAME`."""
    build: Callable[[str, int, int | None], HubNetwork] | None = None
    """Builds a network with fresh weights: `build(name, classes, size)`. None if all networks are trained.

    `size` is the side of the images in pixels, for networks that are built for a fixed size; None selects the
    network's default. The random numbers come from torch's default generator, which the caller seeds.
    """
    load: Callable[[str, str, int], HubNetwork | None] | None = None
    """Loads a network with weights that have a name instead of a file: `load(name, weights, classes)`.

    Returns None for weights that the hub does not know. None if the hub has no named weights.
    """
    load_trained: Callable[[str, int | None, bool], HubNetwork] | None = None
    """Loads a network that has its own weights: `load_trained(name, size, trust_code)`.

    None if the hub has no such networks.
    """
    trained_names: tuple[str, ...] = ("",)
    """Beginnings of the names that `load_trained` accepts."""
    class_names: Callable[[str, str | None], tuple[str, ...] | None] | None = None
    """Returns the names of a network's classes without building it: `class_names(name, weights)`.

    Returns None if they are unknown. None if the hub knows no names.
    """
    weights_help: str = ""
    """Description of the named weights, appended to `--weights FILE` in error messages."""
    unused_weights: tuple[str, ...] = ()
    """Prefixes of tensors in weight files that are ignored because the networks built here lack them."""
    check_output: bool = False
    """True if the shape of a built network's logits is checked by running it once."""
