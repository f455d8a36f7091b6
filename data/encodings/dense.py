"""Encodings that store every value as one floating-point number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings.base import Component, check_range, flat_rows, tensor_of, within
from coursepack.kernels import DenseRows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples


@dataclass(frozen=True)
class Dense:
    """`float32` (exact), `float16` (11 bits, |value| <= 65504) or `bfloat16` (8 bits, float32's range)."""

    name: str

    @property
    def exact(self) -> bool:
        """True if decoding returns the original values."""
        return self.name == "float32"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that describe the encoding."""
        return {"name": self.name}

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """Return the component `values`; bfloat16 is stored as uint16, because NumPy has no such type."""
        return {"values": Component("uint16" if self.name == "bfloat16" else self.name, row_shape)}

    def encode(
        self,
        values: NDArray[np.float32],
        samples: Samples,
        labels: NDArray[np.int64],
    ) -> dict[str, NDArray[Any]]:
        """Round to the stored type, half to even."""
        dtype: torch.dtype = getattr(torch, self.name)
        exact = tensor_of(values)
        rounded = exact.to(dtype, copy=True)
        limit = torch.finfo(dtype).max
        low, high = exact.aminmax() if exact.numel() else (0.0, 0.0)
        if not max(-float(low), float(high)) <= limit:  # true of NaN as well
            lost = (torch.isfinite(exact) & ~torch.isfinite(rounded)).numpy()
            check_range(values, lost, samples, self.name, limit)
        return {"values": (rounded.view(torch.uint16) if self.name == "bfloat16" else rounded).numpy()}

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Return True for rows within half a unit in the last place."""
        decoded = self.rows({"values": torch.from_numpy(stored["values"])}, values.shape[1:]).decode()
        precision = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[self.name]
        bound = precision * np.abs(flat_rows(values)).astype(np.float64) + 2.0**-25
        return within(decoded.numpy(), values, bound, slack)

    def rows(self, components: Mapping[str, torch.Tensor], row_shape: tuple[int, ...]) -> DenseRows:
        """Wrap the stored values."""
        values = components["values"]
        return DenseRows(values.view(torch.bfloat16) if self.name == "bfloat16" else values)
