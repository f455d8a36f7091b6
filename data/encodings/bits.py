"""Encoding of signs in one bit per value, for activation-boundary hints (Heo et al., AAAI 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.data.encodings.base import Component, flat_rows
from coursepack.kernels import BitRows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Samples


@dataclass(frozen=True)
class Bits:
    """Encoding with one bit per value: 1 if the value is positive."""

    name: str = "bits"
    exact: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that describe the encoding."""
        return {"name": self.name}

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """Return the component `bits`: the flattened row, padded with zeros to whole bytes."""
        return {"bits": Component("uint8", (-(-math.prod(row_shape) // 8),))}

    def encode(
        self,
        values: NDArray[np.float32],
        samples: Samples,
        labels: NDArray[np.int64],
    ) -> dict[str, NDArray[Any]]:
        """Pack the signs."""
        return {"bits": np.packbits(flat_rows(values) > 0, axis=1)}

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Return True for rows with the same signs, except for values close to zero."""
        flat = flat_rows(values)
        signs = np.unpackbits(stored["bits"], axis=1, count=flat.shape[1]).astype(bool)
        near_zero = np.abs(flat) <= slack * np.abs(flat).max(1, keepdims=True, initial=0)
        same: NDArray[np.bool_] = ((signs == (flat > 0)) | near_zero).all(1)
        return same

    def rows(self, components: Mapping[str, Tensor], row_shape: tuple[int, ...]) -> BitRows:
        """Wrap the stored bits."""
        return BitRows(components["bits"], row_shape)
