"""What an encoding is: how float32 values are represented in a store, and how they come back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from coursepack.errors import EncodingRange

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.randomness import Samples
    from coursepack.kernels import Rows


@dataclass(frozen=True)
class Component:
    """One stored array of an encoding: the shape and dtype of its rows."""

    dtype: str
    """NumPy's name, little-endian when stored."""
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.row_shape)


class Encoding(Protocol):
    """A frozen object that turns float32 rows into components and components into `Rows`."""

    @property
    def name(self) -> str:
        """How it is asked for: its key in `ENCODINGS`, with its parameter where it has one (`topk:10`)."""

    @property
    def exact(self) -> bool:
        """Whether values come back as they were."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `encoding_from_dict` turns back into an equal object."""

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """What is stored for rows of the given shape."""

    def encode(
        self, values: NDArray[np.float32], samples: Samples, labels: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Components `(n, ...)` of values `(n, ...)`.

        Args:
            values: what to store.
            samples: their indices `(n,)`, named in errors.
            labels: class ids `(n,)`, for encodings that keep the label's entry.

        Raises:
            EncodingRange: a finite value that cannot be represented; the text names sample and way out.
        """

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Whether stored rows are what encoding these values gives, `(n,)`, up to rounding.

        Args:
            values: freshly computed `(n, ...)`.
            stored: components `(n, ...)`.
            slack: how far the values themselves may be off, as a share of each row's largest.
        """

    def rows(self, components: Mapping[str, Tensor], row_shape: tuple[int, ...]) -> Rows:
        """Encoded rows for the loss from gathered components, on the CPU.

        Raises:
            ValueError: components that no encoding of values writes.
        """


def flat_rows(values: NDArray[Any]) -> NDArray[Any]:
    """Rows `(n, D)` of any `(n, ...)`, also where n is 0."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def within(
    decoded: NDArray[np.float32], values: NDArray[np.float32], bound: Any, slack: float
) -> NDArray[np.bool_]:
    """Rows `(n,)` in which every `|decoded - values| <= bound + slack * largest |value| of the row`."""
    wide = flat_rows(values).astype(np.float64)
    distance = np.abs(flat_rows(decoded) - wide)
    close: NDArray[np.bool_] = (
        distance <= bound + slack * np.abs(wide).max(1, keepdims=True, initial=0)
    ).all(1)
    return close


def check_range(
    values: NDArray[np.float32], lost: NDArray[np.bool_], samples: Samples, what: str, limit: float
) -> None:
    """Refuse values that an encoding cannot hold.

    Raises:
        EncodingRange: names the first sample, its value and the encoding to use instead.
    """
    if lost.any():
        row = int(np.flatnonzero(lost.reshape(len(values), -1).any(1))[0])
        worst = float(values[row].reshape(-1)[lost[row].reshape(-1)][0])
        others = "float32" if what == "bfloat16" else "float32 or bfloat16"
        raise EncodingRange(
            f"sample {int(samples[row])} has the value {worst:g}, outside the range of {what} "
            f"(+-{limit:g}): use {others}"
        )
