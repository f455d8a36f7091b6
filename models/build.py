"""Networks by name, with the pixels they expect.

A spec is a name in `NETWORKS`, `torchvision:NAME`, or `run:FOLDER` (what `distill train` wrote, with its
weights). Weights come from a safetensors file, from a `.pt` file read with `weights_only=True`, or from
torchvision by the name of its weights. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from coursepack.config import Config, parse_config, read_yaml
from coursepack.errors import RecipeError, RunError, TeacherMismatch, UnknownName
from coursepack.models.digits import DigitsCNN, DigitsMLP, DigitsResNet, DigitsSmall
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

NETWORK_FILE = "network.yaml"
WEIGHTS_FILE = "student.safetensors"

_DIGITS = Preprocessing(size=8, mean=(0.3,), std=(0.37,))
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class NetworkKind:
    """How a named network is built, and what pixels it expects."""

    build: Callable[[int], nn.Module]
    """From the number of classes."""
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Network:
    """A network with all that is needed to run it on a source's pixels."""

    spec: str
    """The architecture: a name in `NETWORKS` or `torchvision:NAME`."""
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
    classes: int
    preprocessing: Preprocessing


NETWORKS = {
    "digits-small": NetworkKind(DigitsSmall, _DIGITS),
    "digits-mlp": NetworkKind(DigitsMLP, _DIGITS),
    "digits-cnn": NetworkKind(DigitsCNN, _DIGITS),
    "digits-resnet": NetworkKind(DigitsResNet, _DIGITS),
}


def build_network(spec: str, classes: int, *, seed: int = 0, size: int | None = None) -> Network:
    """A network with fresh weights.

    Args:
        spec: a name in `NETWORKS`, or `torchvision:NAME`.
        classes: C, outputs of the network.
        seed: of its initial weights.
        size: side in pixels to render views at, instead of the network's usual size.

    Raises:
        UnknownName: no such network.
        RecipeError: `spec` names weights as well (`run:`).
    """
    kind, _, name = spec.rpartition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "torchvision":
            module, preprocessing = _torchvision_module(name, classes), _torchvision_preprocessing(name)
        elif kind == "run":
            raise RecipeError(f"network {spec!r} is already trained, expected a network to train")
        elif spec in NETWORKS:
            module, preprocessing = NETWORKS[spec].build(classes), NETWORKS[spec].preprocessing
        else:
            raise UnknownName("network", spec, [*NETWORKS, "torchvision:NAME", "run:FOLDER"])
    if size is not None:
        preprocessing = preprocessing.model_copy(update={"size": size})
    return Network(spec, module, preprocessing, classes)


def load_teacher(
    spec: str,
    class_names: tuple[str, ...],
    *,
    weights: str | None = None,
    size: int | None = None,
    columns: Sequence[int] | None = None,
) -> Network:
    """A trained network, checked against the classes of the source it will look at.

    Args:
        spec: `run:FOLDER`, or a network's name together with `weights`.
        class_names: the source's.
        weights: a .safetensors or .pt file, or (for torchvision) the name of weights, as `IMAGENET1K_V2`.
        size: side in pixels to render views at, instead of the network's own.
        columns: for each class of the source the teacher's own class; None means they are the same.

    Raises:
        TeacherMismatch: another class count, a column that the teacher does not have, or weights that do not
            fit the network.
        RecipeError: no weights given.
        RunError: the run folder is missing or unfinished.
    """
    classes = len(class_names)
    if spec.startswith("run:"):
        if weights is not None:
            raise RecipeError(f"teacher {spec!r} brings its own weights: leave --weights out")
        network = _load_run(Path(spec.removeprefix("run:")))
    elif weights is None:
        raise RecipeError(
            f"teacher {spec!r} has no weights: give --weights FILE (.safetensors or .pt)"
            + (", or the name of torchvision's weights" if spec.startswith("torchvision:") else "")
        )
    elif Path(weights).suffix in (".safetensors", ".pt", ".pth"):
        state = _read_weights(Path(weights))
        network = build_network(spec, classes)
        if columns is not None:
            network = build_network(spec, _class_count(network, state))
        _load_weights(network, state, weights)
        network = replace(network, weights_file=str(Path(weights).resolve()))
    else:
        network = _torchvision_pretrained(spec, weights)
    if columns is None and network.classes != classes:
        raise TeacherMismatch(
            f"teacher {spec!r} tells {network.classes} classes apart, but the source has {classes} "
            f"({', '.join(class_names[:3])}, ...): use a teacher trained on the source's classes, or say "
            "which of its classes they are with --classes"
        )
    if columns is not None and max(columns) >= network.classes:
        raise TeacherMismatch(
            f"--classes names class {max(columns)}, but teacher {spec!r} has classes 0..{network.classes - 1}"
        )
    if size is not None:
        network = replace(network, preprocessing=network.preprocessing.model_copy(update={"size": size}))
    return network


def reload_teacher(identity: Mapping[str, Any], class_names: tuple[str, ...], weights: str | None) -> Network:
    """The teacher that wrote a store, from what the store's manifest says of it.

    Args:
        identity: the manifest's `identity["teacher"]`.
        class_names: the source's.
        weights: where its weights are.

    Raises:
        TeacherMismatch: the weights there are not the ones that wrote the store.
        Otherwise as `load_teacher`.
    """
    network = load_teacher(identity["network"], class_names, weights=weights, columns=identity.get("columns"))
    if weights_fingerprint(network.module) != identity["weights"]:
        raise TeacherMismatch(
            f"the weights in {weights!r} are not the ones that wrote the store: "
            "give the old weights, or write the store again"
        )
    return replace(network, preprocessing=Preprocessing.model_validate(identity["preprocessing"]))


def weights_fingerprint(module: nn.Module) -> str:
    """sha256 over the names, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_run(folder: Path) -> Network:
    weights = folder / WEIGHTS_FILE
    if not folder.is_dir():
        raise RunError(f"there is no run at {str(folder)!r}. Make one with `distill train --out {folder}`.")
    if not (folder / NETWORK_FILE).is_file() or not weights.is_file():
        raise RunError(f"run {str(folder)!r} has no trained weights: it is unfinished or not a run")
    description = parse_config(_Description, read_yaml(folder / NETWORK_FILE), str(folder / NETWORK_FILE))
    network = build_network(description.spec, description.classes)
    _load_weights(network, _read_weights(weights), str(weights))
    return replace(network, preprocessing=description.preprocessing, weights_file=str(weights.resolve()))


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise RecipeError(f"there are no weights at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise TeacherMismatch(
            f"{str(path)!r} cannot be read as weights: {error}. "
            "A .pt file may hold a state dict and nothing else"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise TeacherMismatch(
            f"{str(path)!r} holds no state dict, expected tensors by the names of their layers"
        )
    return state


def _class_count(network: Network, state: Mapping[str, Tensor]) -> int:
    """Classes that weights were trained on: rows of whatever has one row per class in the network."""
    for name, value in network.module.state_dict().items():
        stored = state.get(name)
        if stored is not None and stored.shape != value.shape and value.shape[:1] == (network.classes,):
            return int(stored.shape[0])
    return network.classes


def _load_weights(network: Network, state: Mapping[str, Tensor], where: str) -> None:
    own = network.module.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    if missing or extra:
        raise TeacherMismatch(
            f"weights {where!r} are not of network {network.spec!r}: "
            f"missing {missing[:3]}, not expected {extra[:3]} (first three of each)"
        )
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise TeacherMismatch(
                f"weights {where!r} do not fit network {network.spec!r} with {network.classes} classes: "
                f"{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}. If only the "
                "last layer differs, the weights were trained on another number of classes."
            )
    network.module.load_state_dict(dict(state))


def _torchvision_module(name: str, classes: int) -> nn.Module:
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if name not in known:
        raise UnknownName("torchvision network", name, known)
    options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    module: nn.Module = zoo.get_model(name, weights=None, num_classes=classes, **options)
    return module


def _torchvision_preprocessing(name: str) -> Preprocessing:
    """What torchvision's own weights of this network expect; ImageNet's usual values where it has none."""
    import torchvision.models as zoo

    transforms = zoo.get_model_weights(name).DEFAULT.transforms()
    return Preprocessing(size=transforms.crop_size[0], mean=tuple(transforms.mean), std=tuple(transforms.std))


def _torchvision_pretrained(spec: str, weights: str) -> Network:
    import torchvision.models as zoo

    kind, _, name = spec.rpartition(":")
    if kind != "torchvision":
        raise RecipeError(
            f"weights {weights!r} are no file, and only torchvision's networks know weights by name"
        )
    if name not in zoo.list_models(module=zoo):
        raise UnknownName("torchvision network", name, zoo.list_models(module=zoo))
    members = zoo.get_model_weights(name).__members__
    if weights not in members:
        raise UnknownName(f"weights of {spec!r}", weights, members)
    member = members[weights]
    module: nn.Module = zoo.get_model(name, weights=member)
    return Network(
        spec, module, _torchvision_preprocessing(name), len(member.meta["categories"]), weights_file=weights
    )
