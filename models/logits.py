"""Checks of a network's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from coursepack.models.preprocessing import Preprocessing


@torch.no_grad()
def check_logits(spec: str, module: nn.Module, preprocessing: Preprocessing, classes: int) -> None:
    """Run two black images through a network and check that it returns logits `(N, classes)`.

    The network runs in evaluation mode and is in its former mode afterwards.

    Raises:
        RecipeError: the network fails on the images, or returns something else.
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
        raise RecipeError(f"network {spec!r} returns {problem}")


def logits_problem(output: Any, expected: tuple[int, int]) -> str | None:
    """Describe how a network's output differs from logits of the expected shape; None if it does not."""
    if not isinstance(output, torch.Tensor):
        return f"a {type(output).__name__}, expected one tensor of shape {expected} (N, C)"
    if tuple(output.shape) != expected:
        return f"logits of shape {tuple(output.shape)}, expected {expected} (N, C)"
    return None
