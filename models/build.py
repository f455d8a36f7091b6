"""Networks by name, with the pixels they expect.

The spec of a network is a name in `NETWORKS` or the spec of a hub, such as `timm:NAME`. Networks built here
have fresh weights; `models.load` loads trained ones.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from coursepack.config import parse_config
from coursepack.errors import RecipeError, UnknownName
from coursepack.models.hubs import HUBS, HubNetwork, find_hub
from coursepack.models.logits import check_logits
from coursepack.models.networks import NETWORKS as NETWORKS
from coursepack.models.preprocessing import Preprocessing
from coursepack.models.weights import weights_fingerprint as weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

NETWORK_FILE = "network.yaml"
WEIGHTS_FILE = "student.safetensors"
RUN = "run"
"""Prefix of the specs of networks in run folders: `run:FOLDER` and `run:FOLDER@EPOCH`."""


@dataclass(frozen=True)
class Network:
    """A network with everything needed to run it on a source's pixels."""

    spec: str
    """Spec of the architecture; never `run:FOLDER`."""
    module: nn.Module
    preprocessing: Preprocessing
    """Size, channels and normalization of its images."""
    classes: int
    """Number of classes C that it outputs."""
    weights_file: str | None = None
    """File or name that its weights were loaded from; None for fresh weights."""

    def describe(self) -> dict[str, Any]:
        """Return the architecture as plain values, from which `run:FOLDER` builds it again."""
        return {
            "spec": self.spec,
            "classes": self.classes,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
        }


def build_network(
    spec: str,
    classes: int,
    *,
    seed: int = 0,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Build a network with fresh weights.

    Args:
        spec: a name in `NETWORKS`, or the spec of a hub: `torchvision:NAME`, `timm:NAME` or
            `python:MODULE:FACTORY`.
        classes: number of classes C that the network outputs.
        seed: seed of the initial weights. torch's global generator is left unchanged.
        size: side in pixels at which views are rendered. Defaults to the network's own.
        mean: means to subtract per channel, of values in [0, 1]. Default to the network's own.
        std: standard deviations to divide by per channel. Default to the network's own.

    Raises:
        UnknownName: there is no such network.
        RecipeError: `spec` is `run:FOLDER`, a library is missing, a factory does not return a network, or
            `mean` and `std` have another number of channels than the network.
    """
    with seeded(seed):
        return finish_network(spec, build_fresh(spec, classes, size), size, mean, std)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generator inside the context; its former state comes back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def build_fresh(spec: str, classes: int, size: int | None) -> HubNetwork:
    """Build a network with fresh weights from torch's default generator, as its hub returns it.

    Raises:
        UnknownName, RecipeError: as `build_network`.
    """
    if spec in NETWORKS:
        return HubNetwork(NETWORKS[spec].build(classes), NETWORKS[spec].preprocessing, classes)
    if spec.partition(":")[0] == RUN:
        raise RecipeError(f"network {spec!r} is already trained, expected a network to train")
    hub, name = find_hub(spec)
    if hub is None:
        forms = [known.form for known in HUBS.values()]
        raise UnknownName("network", spec, [*NETWORKS, *forms, f"{RUN}:FOLDER"])
    try:
        return hub.build(name, classes, size)
    except AssertionError as error:  # raised by vision transformers for a size that their patches do not tile
        raise RecipeError(
            f"network {spec!r} cannot be built for {size} x {size} pixels: {error}. Choose another size"
        ) from error


def finish_network(
    spec: str,
    built: HubNetwork,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Network:
    """Complete a built network with its preprocessing, and check its output if its hub requires that."""
    preprocessing = _preprocessing(spec, built.preprocessing, size, mean, std)
    hub, _ = find_hub(spec)
    if hub is not None and hub.check_output:
        check_logits(spec, built.module, preprocessing, built.classes)
    return Network(spec, built.module, preprocessing, built.classes)


def _preprocessing(
    spec: str,
    default: Preprocessing | None,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Preprocessing:
    if default is not None:
        return default.changed(size, mean, std)
    if size is None or mean is None or std is None:
        raise RecipeError(
            f"network {spec!r} does not define the pixels it expects: set an attribute of the module that "
            'the factory returns, preprocessing = {"size": 32, "mean": [0.5, 0.5, 0.5], '
            '"std": [0.25, 0.25, 0.25]}'
        )
    values = {"size": size, "mean": tuple(mean), "std": tuple(std)}
    return parse_config(Preprocessing, values, f"the preprocessing of network {spec!r}")
