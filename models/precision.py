"""Precisions in which a teacher can be run, and which of them a device has."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from coursepack.errors import RecipeError, UnknownName
from coursepack.models.float32 import float32_products

if TYPE_CHECKING:
    from collections.abc import Iterator

PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "tf32": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Autocast dtype by precision; None means no autocast. `tf32` rounds the inputs of float32 products."""
AMPERE = (8, 0)
"""Compute capability from which CUDA devices have tf32 and bfloat16."""


def has_precision(precision: str, device: torch.device) -> bool:
    """Return whether a device computes in a precision of `PRECISIONS`."""
    if device.type == "cuda" and precision in ("tf32", "bfloat16"):
        return torch.cuda.get_device_capability(device) >= AMPERE
    return device.type == "cuda" or precision != "tf32"


def check_precision(precision: str, device: torch.device) -> None:
    """Check that a precision exists and that a device has it.

    Raises:
        UnknownName: there is no such precision.
        RecipeError: the device does not have it.
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if not has_precision(precision, device):
        others = " or ".join(other for other in PRECISIONS if has_precision(other, device))
        raise RecipeError(
            f"precision {precision!r} needs a CUDA device of compute capability 8.0 or higher, but the "
            f"device is {str(device)!r}: use --precision {others}, or another --device"
        )


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in a precision on a device, whatever torch's own settings are.

    Under `float16` and `bfloat16`, torch's autocast chooses the operations that are computed in it.
    """
    dtype = PRECISIONS[precision]
    tf32 = precision == "tf32"
    with (
        float32_products("tf32" if tf32 else "ieee"),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        yield
