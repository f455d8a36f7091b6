"""Encodings: how float32 values are represented in a store. Raw logits are kept, never probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from coursepack.errors import EncodingRange, UnknownName
from coursepack.kernels import DenseRows, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Samples


@dataclass(frozen=True)
class Component:
    """One stored array of an encoding: the shape and dtype of its rows."""

    dtype: str
    """NumPy's name, little-endian when stored."""
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.row_shape, dtype=np.int64))


class Encoding(Protocol):
    """A frozen object that turns float32 rows into components and components into `Rows`."""

    @property
    def name(self) -> str:
        """Its key in `ENCODINGS`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `encoding_from_dict` turns back into an equal object."""

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """What is stored for rows of the given shape."""

    def encode(self, values: NDArray[np.float32], samples: Samples) -> dict[str, NDArray[Any]]:
        """Components `(n, ...)` of values `(n, ...)`; `samples` are named in errors."""

    def rows(self, components: Mapping[str, Tensor]) -> Rows:
        """Encoded rows for the loss from gathered components."""


@dataclass(frozen=True)
class Dense:
    """Every value as one floating-point number."""

    name: str
    """`float32` (exact) or `float16` (half a unit in the last place, |value| <= 65504)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name}

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """One component, `values`."""
        return {"values": Component(self.name, row_shape)}

    def encode(self, values: NDArray[np.float32], samples: Samples) -> dict[str, NDArray[Any]]:
        """Round to the stored type.

        Raises:
            EncodingRange: a finite value that the stored type cannot hold.
        """
        with np.errstate(over="ignore"):
            stored = values.astype(self.name)
        lost = np.isinf(stored) & np.isfinite(values)
        if lost.any():
            row = int(np.flatnonzero(lost.reshape(len(values), -1).any(1))[0])
            worst = float(values[row][lost[row]][0])
            raise EncodingRange(
                f"sample {int(samples[row])} has the value {worst:g}, outside the range of {self.name} "
                f"(+-{float(np.finfo(self.name).max):g}). Use --encoding float32."
            )
        return {"values": stored}

    def rows(self, components: Mapping[str, Tensor]) -> Rows:
        """The values as they are stored."""
        return DenseRows(components["values"])


ENCODINGS: dict[str, Callable[[], Encoding]] = {
    "float32": lambda: Dense("float32"),
    "float16": lambda: Dense("float16"),
}


def encoding_from_dict(values: Mapping[str, Any]) -> Encoding:
    """The encoding that `to_dict` described.

    Raises:
        UnknownName: no encoding of that name.
    """
    name = str(values.get("name"))
    if name not in ENCODINGS:
        raise UnknownName("encoding", name, ENCODINGS)
    return ENCODINGS[name]()
