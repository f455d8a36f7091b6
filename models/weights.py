"""Weight files: safe reading without unpickling, checks against a network, and fingerprints."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from coursepack.console import inform
from coursepack.errors import RecipeError, TeacherMismatch
from coursepack.models.hubs import find_hub

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which checkpoints usually keep the state dict, beside the epoch and the optimizer's state."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to the names of all layers."""


def weights_fingerprint(module: nn.Module) -> str:
    """Return the sha256 over the names, shapes, dtypes and values of all parameters and buffers.

    For a network that another library runs from a file, it is the sha256 of its files.
    """
    of_files = getattr(module, "files_fingerprint", None)
    if isinstance(of_files, str):
        return of_files
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read the state dict in a safetensors file, or in a `.pt` file that holds a state dict or a checkpoint.

    Raises:
        RecipeError: there is no such file.
        TeacherMismatch: the file is damaged, or holds something else.
    """
    if not path.is_file():
        raise RecipeError(f"there are no weights at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript")  # refused below with a clearer text
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
            f"{str(path)!r} holds no state dict, expected a mapping from parameter names to tensors, "
            f"directly or under one of the keys {', '.join(WRAPPERS)}; it holds {held}"
        )
    inform(f"{path}: using the state dict under {wrapped[0]!r}")
    return dict(state[wrapped[0]])


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file that `read_weights` read; other files have none."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(part, torch.Tensor) for name, part in value.items())
    )


def _reason(error: Exception) -> str:
    """Explain why a file cannot be read as weights.

    torch's own message recommends `weights_only=False`, which would run code from the file.
    """
    text = str(error)
    if "weights_only" not in text:
        return f"{text or type(error).__name__}. Expected a state dict written by torch.save"
    found = re.search(r"GLOBAL ([\w.]+)", text)
    kind = "TorchScript code" if "TorchScript" in text else found[1] if found else "objects"
    return (
        f"it holds {kind[:100]}, expected only tensors. Reading anything else could run code from the file, "
        "which is never done here. If you trust the file, load the model yourself and save its weights: "
        "torch.save(model.state_dict(), 'weights.pt'), or export it to ONNX: --teacher onnx:FILE"
    )


def without_prefix(state: Mapping[str, Tensor], module: nn.Module, where: str) -> Mapping[str, Tensor]:
    """Remove a wrapper's prefix (`PREFIXES`) from the names of all weights.

    Args:
        state: weights by name.
        module: the network. A prefix that its own parameters have is kept.
        where: file of the weights, for the message on stderr.
    """
    own = module.state_dict().keys()
    for prefix in PREFIXES * 2:
        if state and all(name.startswith(prefix) for name in state) and own.isdisjoint(state):
            inform(f"{where}: removed the prefix {prefix!r} from the names of all layers")
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def class_count(module: nn.Module, classes: int, state: Mapping[str, Tensor]) -> int:
    """Return the number of classes that weights were trained on.

    It is the number of rows of the first tensor whose shape differs from the network's and that has one row
    per class there; `classes` if there is none.

    Args:
        module: the network, built for `classes` classes.
        classes: number of classes C of the network.
        state: weights by name.
    """
    for name, value in module.state_dict().items():
        stored = state.get(name)
        if stored is not None and stored.shape != value.shape and value.shape[:1] == (classes,):
            return int(stored.shape[0])
    return classes


_OTHER_CLASSES = (
    ". If the weights are for {:,} classes, use --classes MAP to select the source's {:,} of them"
)


def load_weights(spec: str, module: nn.Module, classes: int, state: Mapping[str, Tensor], where: str) -> None:
    """Load weights into a network in place.

    Args:
        spec: spec of the network.
        module: the network.
        classes: number of classes C that the network outputs.
        state: weights by name.
        where: file of the weights, for error messages.

    Raises:
        TeacherMismatch: the weights do not fit the network.
    """
    module.load_state_dict(dict(fitting_weights(spec, module, classes, state, where)))


def fitting_weights(
    spec: str, module: nn.Module, classes: int, state: Mapping[str, Tensor], where: str
) -> Mapping[str, Tensor]:
    """Return the weights that `load_weights` would load into a network, without changing the network.

    Raises:
        TeacherMismatch: a name or a shape differs.
    """
    own = module.state_dict()
    hub, _ = find_hub(spec)
    if hub is not None and hub.unused_weights:
        state = {name: value for name, value in state.items() if not name.startswith(hub.unused_weights)}
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
