"""The interface of an encoding, which converts float32 values to stored arrays and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from coursepack.errors import EncodingRange

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Samples
    from coursepack.kernels import Rows


@dataclass(frozen=True)
class Component:
    """Shape and dtype of the rows of one stored array."""

    dtype: str
    """NumPy dtype name; little-endian when stored."""
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.row_shape)


class Encoding(Protocol):
    """Immutable object that encodes float32 rows as components, and wraps components as `Rows`."""

    @property
    def name(self) -> str:
        """Key in `ENCODINGS`, followed by the parameter if there is one (`topk:10`)."""

    @property
    def exact(self) -> bool:
        """True if decoding returns the original values."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `encoding_from_dict` converts to an equal object."""

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """Return the components stored for rows of the given shape."""

    def encode(
        self, values: NDArray[np.float32], samples: Samples, labels: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Encode values `(n, ...)` as components `(n, ...)`.

        Args:
            values: values to store.
            samples: sample indices `(n,)`, named in errors.
            labels: class ids `(n,)`, for encodings that keep the label's entry.

        Raises:
            EncodingRange: a finite value cannot be represented; the message names the sample and an
                alternative.
        """

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Return, for each row `(n,)`, True if the stored row is an encoding of these values up to rounding.

        Args:
            values: freshly computed values `(n, ...)`.
            stored: components `(n, ...)`.
            slack: tolerance of the values themselves, relative to each row's largest magnitude.
        """

    def rows(self, components: Mapping[str, Tensor], row_shape: tuple[int, ...]) -> Rows:
        """Wrap gathered components on the CPU as encoded rows for the loss.

        Raises:
            ValueError: the components hold values that the encoding never writes.
        """


def tensor_of(values: NDArray[Any]) -> Tensor:
    """Return a tensor of the values, in the array's memory unless that is strided or read-only."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def flat_rows(values: NDArray[Any]) -> NDArray[Any]:
    """Flatten `(n, ...)` to rows `(n, D)`; n may be 0."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def within(
    decoded: NDArray[np.float32], values: NDArray[np.float32], bound: Any, slack: float
) -> NDArray[np.bool_]:
    """Return True for each row with `|decoded - values| <= bound + slack * max |values|`, as `(n,)`."""
    flat = flat_rows(values).astype(np.float64)
    distance = np.abs(flat_rows(decoded) - flat)
    close: NDArray[np.bool_] = (
        distance <= bound + slack * np.abs(flat).max(1, keepdims=True, initial=0)
    ).all(1)
    return close


def check_range(
    values: NDArray[np.float32], lost: NDArray[np.bool_], samples: Samples, encoding: str, limit: float
) -> None:
    """Refuse values that an encoding cannot represent.

    Args:
        values: values `(n, ...)`.
        lost: True where a value cannot be represented `(n, ...)`.
        samples: sample indices `(n,)`.
        encoding: name of the encoding, for the error.
        limit: largest magnitude that the encoding represents.

    Raises:
        EncodingRange: names the first sample, its value and the encodings to use instead.
    """
    if lost.any():
        row = int(np.flatnonzero(lost.reshape(len(values), -1).any(1))[0])
        worst = float(values[row].reshape(-1)[lost[row].reshape(-1)][0])
        alternatives = "float32" if encoding == "bfloat16" else "float32 or bfloat16"
        raise EncodingRange(
            f"sample {int(samples[row])} has the value {worst:g}, outside the range of {encoding} "
            f"(+-{limit:g}): use {alternatives}"
        )
