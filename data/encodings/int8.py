"""Encoding of one byte per value, affine per row: as accurate as bfloat16 at half the size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings.base import Component, check_range, flat_rows, within
from coursepack.kernels import Int8Rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples

LEVELS = 255
LIMIT = float(np.finfo(np.float16).max) / 2
"""Largest magnitude, so that the range of a row fits a float16."""


@dataclass(frozen=True)
class Int8:
    """Affine encoding `minimum + scale * q`, with float16 scale and minimum per row.

    q is rounded with respect to scale and minimum as stored, so the error is at most half a scale. The
    minimum is rounded down and the scale up, so that no value of the row is out of range.
    """

    name: str = "int8"
    exact: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that describe the encoding."""
        return {"name": self.name}

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """Return `q`, one byte per value, and `affine`, scale and minimum per row."""
        return {"q": Component("uint8", row_shape), "affine": Component("float16", (2,))}

    def encode(
        self,
        values: NDArray[np.float32],
        samples: Samples,
        labels: NDArray[np.int64],
    ) -> dict[str, NDArray[Any]]:
        """Quantize each row over its own range."""
        q, affine = quantized(values, samples, self.name, LEVELS)
        return {"q": q, "affine": affine}

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Return True for rows within half a step of their own scale."""
        tensors = {name: torch.from_numpy(component) for name, component in stored.items()}
        decoded = self.rows(tensors, values.shape[1:]).decode()
        return within(decoded.numpy(), values, 0.501 * stored["affine"][:, :1].astype(np.float64), slack)

    def rows(self, components: Mapping[str, torch.Tensor], row_shape: tuple[int, ...]) -> Int8Rows:
        """Wrap the stored bytes, scales and minima."""
        return Int8Rows(components["q"], components["affine"])


def quantized(
    values: NDArray[np.float32], samples: Samples, name: str, levels: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Quantize each row over its own range.

    Args:
        values: `(n, ...)`.
        samples: their indices `(n,)`, named in errors.
        name: the encoding, named in errors.
        levels: largest quantized value, 255 at most.

    Returns:
        Quantized values `(n, ...)` from 0 to `levels`, and scale and minimum of each row `(n, 2)`.

    Raises:
        EncodingRange: a value whose row would not fit the float16 of scale and minimum.
    """
    check_range(values, np.abs(values) > LIMIT, samples, name, LIMIT)
    flat = flat_rows(values).astype(np.float32)
    minimum = rounded(flat.min(1), -np.inf)
    scale = rounded((flat.max(1).astype(np.float64) - minimum) / levels, np.inf)
    width = np.where(scale == 0, 1, scale).astype(np.float32)
    q = np.rint((flat - minimum.astype(np.float32)[:, None]) / width[:, None])
    return np.clip(q, 0, levels).astype(np.uint8).reshape(values.shape), np.stack([scale, minimum], axis=1)


def rounded(values: NDArray[np.floating[Any]], toward: float) -> NDArray[np.float16]:
    """Round to float16 toward -inf or inf."""
    stored = values.astype(np.float16)
    beyond = stored > values if toward < 0 else stored < values
    with np.errstate(over="ignore"):  # beside the largest float16, which is not used
        return np.where(beyond, np.nextafter(stored, np.float16(toward)), stored)
