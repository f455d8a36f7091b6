"""Choice of the device that networks run on."""

from __future__ import annotations

import torch

from coursepack.errors import RecipeError


def pick_device(name: str) -> torch.device:
    """Return the device named `cpu`, `cuda`, `cuda:NUMBER` or `auto`.

    `auto` is a CUDA device if torch sees one, and the CPU otherwise.

    Raises:
        RecipeError: the name is another, or names a CUDA device and torch sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise RecipeError(f"device is {name!r}, expected cpu, cuda, cuda:NUMBER or auto")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"device is {name!r}, but torch sees no CUDA device: use --device cpu")
    return torch.device(name)
