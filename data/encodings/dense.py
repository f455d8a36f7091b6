"""Encodings that store every value as one floating-point number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings.base import Component, check_range, flat_rows, within
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
        if self.name == "bfloat16":
            rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
            lost = (~torch.isfinite(rounded)).numpy() & np.isfinite(values)
            check_range(values, lost, samples, self.name, float(torch.finfo(torch.bfloat16).max))
            return {"values": rounded.view(torch.uint16).numpy()}
        with np.errstate(over="ignore"):
            stored = values.astype(self.name)
        lost = np.isinf(stored) & np.isfinite(values)
        check_range(values, lost, samples, self.name, float(np.finfo(self.name).max))
        return {"values": stored}

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
