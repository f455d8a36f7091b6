"""Weights on disk: reading them without unpickling anything, whether they fit, and their fingerprint."""

from __future__ import annotations

import hashlib
import pickle
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coursepack.errors import RecipeError, TeacherMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth")
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
    """A state dict from a safetensors file, or from a `.pt` file that holds nothing else.

    Raises:
        RecipeError: there is no such file.
        TeacherMismatch: it is damaged, or holds something else.
    """
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
            raise TeacherMismatch(
                f"weights {where!r} do not fit network {spec!r} with {classes} classes: "
                f"{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}. If only the "
                "last layer differs, the weights were trained on another number of classes."
            )
    return state
