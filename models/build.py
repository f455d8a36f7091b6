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
from coursepack.models.hubs import HUBS, HubNetwork, find_hub, has_weights
from coursepack.models.logits import check_logits
from coursepack.models.networks import NETWORKS as NETWORKS
from coursepack.models.preprocessing import Preprocessing
from coursepack.models.weights import weights_fingerprint as weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from coursepack.models.record import Record

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
    """File, name or spec that its weights were loaded from; None for fresh weights."""
    class_names: tuple[str, ...] | None = None
    """Names of its classes, if its hub records them."""
    columns: tuple[int, ...] | None = None
    """Index of its class for each class of the source, found by name; None if they are the same."""
    settings: str | None = None
    """Fingerprint of the configuration that determines outputs beside `spec` and weights, if there is one."""
    library: str | None = None
    """Name and version of the library that runs it, if its hub depends on one."""
    record: Record | None = None
    """Accuracy that its run recorded, if it comes from a run folder."""

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
    if hub.build is None or has_weights(spec):
        raise RecipeError(f"network {spec!r} is already trained, expected a network to train")
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
    preprocessing = _preprocessing(spec, built, size, mean, std)
    hub, _ = find_hub(spec)
    if hub is not None and hub.check_output:
        check_logits(spec, built.module, preprocessing, built.classes)
    return Network(
        built.spec or spec,
        built.module,
        preprocessing,
        built.classes,
        built.origin,
        class_names=built.class_names,
        settings=built.settings,
        library=built.library,
    )


def _preprocessing(
    spec: str,
    built: HubNetwork,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Preprocessing:
    if built.preprocessing is not None:
        return built.preprocessing.changed(size, mean, std)
    size = built.size if size is None else size
    if size is None or mean is None or std is None:
        if has_weights(spec):
            missing = {"--size": size, "--mean": mean, "--std": std}
            names = ", ".join(name for name, value in missing.items() if value is None)
            raise RecipeError(
                f"network {spec!r} does not define the pixels it expects: give {names} "
                "(mean and standard deviation per channel, of values in [0, 1])"
            )
        raise RecipeError(
            f"network {spec!r} does not define the pixels it expects: set an attribute of the module that "
            'the factory returns, preprocessing = {"size": 32, "mean": [0.5, 0.5, 0.5], '
            '"std": [0.25, 0.25, 0.25]}'
        )
    values = {"size": size, "mean": tuple(mean), "std": tuple(std)}
    return parse_config(Preprocessing, values, f"the preprocessing of network {spec!r}")
