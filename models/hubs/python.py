"""Networks from Python: `python:module:factory` calls `factory(classes)`.

What comes back is a `torch.nn.Module` that gives logits `(N, classes)`. Its attribute `preprocessing`, if it
has one, says what pixels it expects: `{"size": 32, "mean": [...], "std": [...]}`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coursepack.config import parse_config
from coursepack.errors import CoursepackError, RecipeError
from coursepack.imports import own_object
from coursepack.models.preprocessing import Preprocessing


def own_network(name: str, classes: int) -> tuple[nn.Module, Preprocessing | None]:
    """What a factory makes, and the pixels that it says it expects.

    Args:
        name: `module:factory`; the factory's name may have dots.
        classes: C.

    Raises:
        RecipeError: there is no such factory, it fails, or it makes something else.
    """
    spec = f"python:{name}"
    module_name, _, path = name.partition(":")
    if not (module_name and path):
        raise RecipeError(f"network {spec!r} is not python:MODULE:FACTORY")
    factory = own_object(module_name, path, f"network {spec!r}")
    try:
        module = factory(classes)
    except CoursepackError:
        raise
    except Exception as error:
        raise RecipeError(
            f"network {spec!r}: {path}({classes}) failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise RecipeError(
            f"network {spec!r}: {path} gave a {type(module).__name__}, expected a torch.nn.Module"
        )
    stated = getattr(module, "preprocessing", None)
    if stated is None or isinstance(stated, Preprocessing):
        return module, stated
    return module, parse_config(Preprocessing, stated, f"the preprocessing of network {spec!r}")


@torch.no_grad()
def check_logits(spec: str, module: nn.Module, preprocessing: Preprocessing, classes: int) -> None:
    """Refuse a network that does not give `(N, classes)`, by running two black images.

    Raises:
        RecipeError: it cannot take them, or gives something else.
    """
    size, channels = preprocessing.size, preprocessing.channels
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        logits: Any = module(preprocessing(torch.zeros(2, size, size, channels, dtype=torch.uint8)))
    except Exception as error:
        raise RecipeError(
            f"network {spec!r} cannot take images (2, {channels}, {size}, {size}): "
            f"{type(error).__name__}: {error}"
        ) from error
    for layer, training in modes:
        layer.training = training
    if (problem := logits_problem(logits, (2, classes))) is not None:
        raise RecipeError(f"network {spec!r} gives {problem}")


def logits_problem(output: Any, expected: tuple[int, int]) -> str | None:
    """What a network gave and should have given, in words, unless it gave logits of the expected shape."""
    if not isinstance(output, torch.Tensor):
        return f"a {type(output).__name__}, expected one tensor of shape {expected} (N, C)"
    if tuple(output.shape) != expected:
        return f"logits of shape {tuple(output.shape)}, expected {expected} (N, C)"
    return None
