"""Choice of the device that networks run on, and copies to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray


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


def rank_device(name: str) -> torch.device:
    """Return the device of this rank of torchrun: for `cuda`, one GPU per rank of this machine.

    Raises:
        RecipeError: as `pick_device`, a single GPU is named for several ranks, or there are fewer GPUs than
            ranks.
    """
    device = pick_device(name)
    if device.type == "cpu":
        return device
    index, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index is not None or index >= gpus:
        problem = f"device is {name!r}" if device.index is not None else f"this machine has {gpus} GPUs"
        raise RecipeError(
            f"{problem}, but {os.environ.get('LOCAL_WORLD_SIZE', '1')} ranks run on it and each needs a GPU "
            "of its own: give --device cuda and --nproc-per-node equal to the number of GPUs, or --device cpu"
        )
    return torch.device("cuda", index)


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device.

    On the CPU the tensor shares the array's memory. To a GPU the values are copied from pinned memory, on the
    current stream and without waiting for it.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the CPU in memory that the device can copy from asynchronously."""
    return values.pin_memory() if device.type == "cuda" else values
