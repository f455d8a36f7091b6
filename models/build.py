"""Networks by name, with the pixels they expect.

A spec is a name in `NETWORKS`, `torchvision:NAME`, `timm:NAME`, `python:module:factory`, or `run:FOLDER`
(what `distill train` wrote, with its weights). Weights come from a safetensors file, from a `.pt` file read
with `weights_only=True`, from torchvision by the name of its weights, or from a factory of one's own. Nothing
is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from coursepack.config import Config, parse_config, read_yaml
from coursepack.errors import CoursepackError, RecipeError, RunError, TeacherMismatch, UnknownName
from coursepack.imports import check_trusted
from coursepack.models.hubs.libraries import timm_network, torchvision_network, torchvision_trained
from coursepack.models.hubs.python import check_logits, own_network
from coursepack.models.networks import NETWORKS as NETWORKS
from coursepack.models.preprocessing import Preprocessing
from coursepack.models.weights import (
    SUFFIXES,
    class_count,
    fitting_weights,
    load_weights,
    read_weights,
    without_prefix,
)
from coursepack.models.weights import weights_fingerprint as weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

NETWORK_FILE = "network.yaml"
WEIGHTS_FILE = "student.safetensors"
OWN_WEIGHTS = "own"
"""In the place of a file: a factory of one's own gives a trained network."""


_ZOOS = {"torchvision": torchvision_network, "timm": timm_network}


@dataclass(frozen=True)
class Network:
    """A network with all that is needed to run it on a source's pixels."""

    spec: str
    """The architecture: any spec but `run:FOLDER`."""
    module: nn.Module
    preprocessing: Preprocessing
    classes: int
    weights_file: str | None = None
    """Where its weights came from; None for fresh ones."""

    def describe(self) -> dict[str, Any]:
        """What `run:` needs to build it again, as plain values."""
        return {
            "spec": self.spec,
            "classes": self.classes,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
        }


class _Description(Config):
    """What `Network.describe` gives."""

    spec: str
    classes: Annotated[int, Field(ge=1)]
    preprocessing: Preprocessing


def build_network(
    spec: str,
    classes: int,
    *,
    seed: int = 0,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """A network with fresh weights.

    Args:
        spec: a name in `NETWORKS`, `torchvision:NAME`, `timm:NAME` or `python:module:factory`.
        classes: C, outputs of the network.
        seed: of its initial weights.
        size: side in pixels to render views at, instead of the network's usual size.
        mean: subtracted per channel of values in [0, 1], instead of the network's usual means.
        std: divided by, per channel, instead of the network's usual standard deviations.

    Raises:
        UnknownName: no such network.
        RecipeError: `spec` names weights as well (`run:`), a library is missing, a factory does not make a
            network, or the normalisation is for another number of channels.
    """
    kind, _, name = spec.partition(":")
    usual: Preprocessing | None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if spec in NETWORKS:
            module, usual = NETWORKS[spec].build(classes), NETWORKS[spec].preprocessing
        elif kind in _ZOOS:
            try:
                module, usual = _ZOOS[kind](name, classes, size)
            except AssertionError as error:  # what vision transformers say of a size
                raise RecipeError(
                    f"network {spec!r} cannot be built for {size} x {size} pixels: {error}. Choose "
                    "another size"
                ) from error
        elif kind == "python":
            module, usual = own_network(name, classes)
        elif kind == "run":
            raise RecipeError(f"network {spec!r} is already trained, expected a network to train")
        else:
            others = ["torchvision:NAME", "timm:NAME", "python:MODULE:FACTORY", "run:FOLDER"]
            raise UnknownName("network", spec, [*NETWORKS, *others])
        preprocessing = _preprocessing(spec, usual, size, mean, std)
        if kind == "python":
            check_logits(spec, module, preprocessing, classes)
    return Network(spec, module, preprocessing, classes)


def own_preprocessing(spec: str) -> Preprocessing | None:
    """What pixels a network expects where nobody says otherwise; None where only building it would tell.

    Raises:
        RunError, RecipeError: `run:` names no finished run.
    """
    if spec.startswith("run:"):
        return _description(Path(spec.removeprefix("run:"))).preprocessing
    return NETWORKS[spec].preprocessing if spec in NETWORKS else None


def _preprocessing(
    spec: str,
    usual: Preprocessing | None,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Preprocessing:
    if usual is not None:
        return usual.changed(size, mean, std)
    if size is None or mean is None or std is None:
        raise RecipeError(
            f"network {spec!r} does not say what pixels it expects: give what the factory makes an attribute "
            'preprocessing = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}'
        )
    values = {"size": size, "mean": tuple(mean), "std": tuple(std)}
    return parse_config(Preprocessing, values, f"the preprocessing of network {spec!r}")


def load_teacher(
    spec: str,
    class_names: tuple[str, ...],
    *,
    weights: str | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    columns: Sequence[int] | None = None,
    trust_code: bool = False,
) -> Network:
    """A trained network, checked against the classes of the source it will look at.

    Args:
        spec: `run:FOLDER`, or a network's name together with `weights`.
        class_names: the source's.
        weights: a .safetensors or .pt file; for torchvision also the name of weights, as `IMAGENET1K_V2`; for
            `python:` also `own`, where the factory gives a trained network.
        size: side in pixels to render views at, instead of the network's own.
        mean: as in `build_network`, instead of the network's own.
        std: as in `build_network`, instead of the network's own.
        columns: for each class of the source the teacher's own class; None means they are the same.
        trust_code: build the network of a run's folder even if it names Python code for it.

    Raises:
        UntrustedCode: the run's folder names Python code, and `trust_code` is false.
        TeacherMismatch: another class count, a column that the teacher does not have, or weights that do not
            fit the network.
        RecipeError: no weights given.
        RunError: the run folder is missing or unfinished.
    """
    classes = len(class_names)
    if spec.startswith("run:"):
        if weights is not None:
            raise RecipeError(f"teacher {spec!r} brings its own weights: leave --weights out")
        network = _load_run(Path(spec.removeprefix("run:")), trust_code=trust_code)
    elif weights is None:
        raise RecipeError(f"teacher {spec!r} has no weights: give --weights {_weights_known(spec)}")
    elif Path(weights).suffix in SUFFIXES:
        state = read_weights(Path(weights))
        network = build_network(spec, classes, size=size, mean=mean, std=std)
        state = without_prefix(state, network.module, weights)
        if columns is not None:
            trained_on = class_count(network.module, classes, state)
            network = build_network(spec, trained_on, size=size, mean=mean, std=std)
        load_weights(spec, network.module, network.classes, state, weights)
        network = replace(network, weights_file=str(Path(weights).resolve()))
    elif spec.startswith("torchvision:"):
        module, preprocessing, trained_on = torchvision_trained(spec.removeprefix("torchvision:"), weights)
        network = Network(spec, module, preprocessing, trained_on, weights)
    elif spec.startswith("python:") and weights == OWN_WEIGHTS:
        network = replace(build_network(spec, classes, size=size, mean=mean, std=std), weights_file=weights)
    else:
        raise RecipeError(
            f"weights {weights!r} are no file, and only torchvision's networks know weights by name"
        )
    _check_classes(spec, network.classes, class_names, columns)
    return replace(network, preprocessing=network.preprocessing.changed(size, mean, std))


def _weights_known(spec: str) -> str:
    known = "FILE (.safetensors or .pt)"
    if spec.startswith("torchvision:"):
        return known + ", or the name of torchvision's weights"
    if spec.startswith("python:"):
        return known + f", or --weights {OWN_WEIGHTS} if the factory gives a trained network"
    return known


def _check_classes(
    spec: str, trained_on: int, class_names: tuple[str, ...], columns: Sequence[int] | None
) -> None:
    if columns is None and trained_on != len(class_names):
        raise TeacherMismatch(
            f"teacher {spec!r} tells {trained_on} classes apart, but the source has {len(class_names)} "
            f"({', '.join(class_names[:3])}, ...): use a teacher trained on the source's classes, or say "
            "which of its classes they are with --classes"
        )
    if columns is not None and max(columns) >= trained_on:
        raise TeacherMismatch(
            f"--classes names class {max(columns)}, but teacher {spec!r} has classes 0..{trained_on - 1}"
        )


def reload_teacher(
    identity: Mapping[str, Any],
    class_names: tuple[str, ...],
    weights: str | None,
    *,
    holder: str = "the store",
    trust_code: bool = False,
) -> Network:
    """The teacher that wrote a store, from what the store's manifest says of it.

    Args:
        identity: the manifest's `identity["teacher"]`.
        class_names: the source's.
        weights: where its weights are.
        holder: the store, for errors: `store 'cnn.zarr'`.
        trust_code: build the network even if the manifest names Python code for it.

    Raises:
        UntrustedCode: it does, and `trust_code` is false.
        TeacherMismatch: the weights there are not the ones that wrote the store.
        Otherwise as `load_teacher`.
    """
    pixels = parse_config(Preprocessing, identity["preprocessing"], f"the preprocessing in {holder}")
    network = load_teacher(
        check_trusted(identity["network"], holder, trust_code=trust_code),
        class_names,
        weights=weights,
        size=pixels.size,
        mean=pixels.mean,
        std=pixels.std,
        columns=identity.get("columns"),
        trust_code=trust_code,
    )
    if weights_fingerprint(network.module) != identity["weights"]:
        raise TeacherMismatch(
            f"the weights in {weights!r} are not the ones that wrote the store: "
            "give the old weights, or write the store again"
        )
    return network


def _description(folder: Path) -> _Description:
    if not folder.is_dir():
        raise RunError(f"there is no run at {str(folder)!r}. Make one with `distill train --out {folder}`.")
    if not (folder / NETWORK_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise RunError(f"run {str(folder)!r} has no trained weights: it is unfinished or not a run")
    return parse_config(_Description, read_yaml(folder / NETWORK_FILE), str(folder / NETWORK_FILE))


def _described(stated: _Description) -> Network:
    pixels = stated.preprocessing
    return build_network(stated.spec, stated.classes, size=pixels.size, mean=pixels.mean, std=pixels.std)


def _check_size(stated: _Description, state: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a network that is not that of its weights before it takes memory."""
    if not any(stated.classes in value.shape for value in state.values()):
        raise TeacherMismatch(
            f"{str(folder / NETWORK_FILE)!r} says {stated.classes} classes, but no tensor of "
            f"{WEIGHTS_FILE} has a side of that length"
        )
    try:
        with torch.device("meta"):
            sketch = _described(stated)
    except CoursepackError:
        raise
    except Exception:  # a network whose making computes with its own tensors
        return
    fitting_weights(stated.spec, sketch.module, stated.classes, state, str(folder / WEIGHTS_FILE))


def _load_run(folder: Path, *, trust_code: bool) -> Network:
    stated, weights = _description(folder), folder / WEIGHTS_FILE
    check_trusted(stated.spec, f"run {str(folder)!r}", trust_code=trust_code)
    state = read_weights(weights)
    _check_size(stated, state, folder)
    network = _described(stated)
    load_weights(stated.spec, network.module, stated.classes, state, str(weights))
    return replace(network, weights_file=str(weights.resolve()))
