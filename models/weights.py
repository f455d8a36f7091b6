"""Weights on disk: reading them without unpickling anything, whether they fit, and their fingerprint."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coursepack.console import say
from coursepack.errors import RecipeError, TeacherMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Under which of these names checkpoints usually keep the state dict, beside the epoch and the like."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the names of all layers."""
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Heads of torchvision's GoogLeNet and Inception that run in training alone; networks here have none."""


def weights_fingerprint(module: nn.Module) -> str:
    """sha256 over the names, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict from a safetensors file, or from a `.pt` file that holds one, alone or in a checkpoint.

    Raises:
        RecipeError: there is no such file.
        TeacherMismatch: it is damaged, or holds something else.
    """
    if not path.is_file():
        raise RecipeError(f"there are no weights at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript")  # refused below in our own words
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise TeacherMismatch(f"{str(path)!r} cannot be read as weights: {_reason(error)}") from error
    if _is_state(state):
        return dict(state)
    wrapped = [name for name in WRAPPERS if isinstance(state, dict) and _is_state(state.get(name))]
    if len(wrapped) != 1:
        held = f"a {type(state).__name__}"
        if isinstance(state, dict):
            held = (
                f"{len(wrapped)} of them ({', '.join(wrapped)})" if wrapped else f"{list(state)[:5]!r:.100}"
            )
        raise TeacherMismatch(
            f"{str(path)!r} holds no state dict, expected tensors by the names of their layers, or those "
            f"under one of the names {', '.join(WRAPPERS)}; it holds {held}"
        )
    say(f"{path}: the state dict is taken from under {wrapped[0]!r}")
    return dict(state[wrapped[0]])


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(part, torch.Tensor) for name, part in value.items())
    )


def _reason(error: Exception) -> str:
    """Why a file is no weights; torch's own texts advise to run what the file says."""
    text = str(error)
    if "weights_only" not in text:
        return f"{text or type(error).__name__}. A .pt file holds what torch.save wrote of a state dict"
    found = re.search(r"GLOBAL ([\w.]+)", text)
    kind = "TorchScript code" if "TorchScript" in text else found[1] if found else "objects"
    return (
        f"it holds {kind[:100]}, expected tensors alone. To read anything else is to run what the file says, "
        "which is never done here. Where you trust the file, load the model yourself and save its weights: "
        "torch.save(model.state_dict(), 'weights.pt')"
    )


def without_prefix(state: Mapping[str, Tensor], module: nn.Module, where: str) -> Mapping[str, Tensor]:
    """Weights by the names that the network's layers have, where a wrapper put something before all of them.

    Args:
        state: the weights.
        module: the network; what stands before its own names stays.
        where: where the weights came from, for what is said.
    """
    own = module.state_dict().keys()
    for prefix in PREFIXES * 2:
        if state and all(name.startswith(prefix) for name in state) and own.isdisjoint(state):
            say(f"{where}: {prefix!r} before the names of all layers is left out")
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def class_count(module: nn.Module, classes: int, state: Mapping[str, Tensor]) -> int:
    """Classes that weights were trained on: rows of whatever has one row per class in the network.

    Args:
        module: the network, built for another number of classes.
        classes: that number.
        state: the weights.
    """
    for name, value in module.state_dict().items():
        stored = state.get(name)
        if stored is not None and stored.shape != value.shape and value.shape[:1] == (classes,):
            return int(stored.shape[0])
    return classes


_OTHER_CLASSES = ". If the weights tell {:,} classes apart, say with --classes MAP which of them the {:,} are"


def load_weights(spec: str, module: nn.Module, classes: int, state: Mapping[str, Tensor], where: str) -> None:
    """Put weights into a network.

    Args:
        spec: the network's name.
        module: changed in place.
        classes: outputs of the network.
        state: the weights.
        where: where they came from, for the error's text.

    Raises:
        TeacherMismatch: as `fitting_weights`.
    """
    module.load_state_dict(dict(fitting_weights(spec, module, classes, state, where)))


def fitting_weights(
    spec: str, module: nn.Module, classes: int, state: Mapping[str, Tensor], where: str
) -> Mapping[str, Tensor]:
    """The weights that a network has a place for; as `load_weights`, but the network stays as it is.

    Raises:
        TeacherMismatch: a name or a shape differs.
    """
    own = module.state_dict()
    if spec.startswith("torchvision:"):
        state = {name: value for name, value in state.items() if not name.startswith(AUXILIARY)}
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    if missing or extra:
        raise TeacherMismatch(
            f"weights {where!r} are not of network {spec!r}: "
            f"missing {missing[:3]}, not expected {extra[:3]} (first three of each)"
        )
    for name, value in own.items():
        if state[name].shape != value.shape:
            trained_on = class_count(module, classes, state)
            advice = "" if trained_on == classes else _OTHER_CLASSES.format(trained_on, classes)
            raise TeacherMismatch(
                f"weights {where!r} do not fit network {spec!r} with {classes} classes: "
                f"{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}{advice}"
            )
    return state
