"""Encoding of the k largest logits in a few bits each, and the mass of the others at two temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings.base import Component, check_range, tensor_of
from coursepack.data.encodings.int8 import LIMIT, rounded
from coursepack.data.encodings.topk import check_topk, kept_classes, log_masses
from coursepack.errors import RecipeError
from coursepack.kernels import PackedTopKRows
from coursepack.kernels.packed import (
    CODE_BITS,
    LARGEST_CODE,
    PACKED_TAIL_TEMPERATURES,
    low_bits,
    packed_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples


@dataclass(frozen=True)
class PackedTopK:
    """Sparse encoding for many classes: sorted class ids, and gaps below the top logit in six bits each.

    It loses the shape of the tail: measure the effect before use (`precompute inspect`).
    """

    k: int
    label: bool = True
    """True if the label is always among the kept classes."""

    def __post_init__(self) -> None:
        check_topk("topk", self.k)
        if not isinstance(self.label, bool):
            raise RecipeError(f"label of encoding topk is {self.label!r}, expected true or false")

    @property
    def name(self) -> str:
        """`topk:K`, or `topk:K,label=no`."""
        return f"topk:{self.k}" + ("" if self.label else ",label=no")

    @property
    def exact(self) -> bool:
        """True if decoding returns the original values: always False."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that describe the encoding."""
        return {"name": "packed_topk", "k": self.k, "label": self.label}

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """Return `entries`, ids and gaps bit by bit, and `scale`: top logit, range and masses of the rest.

        Raises:
            RecipeError: the rows are not logits, or have fewer than k classes.
        """
        check_topk(self.name, self.k, row_shape)
        return {
            "entries": Component("uint8", (packed_bytes(row_shape[0], self.k),)),
            "scale": Component("float16", (2 + len(PACKED_TAIL_TEMPERATURES),)),
        }

    def encode(
        self, values: NDArray[np.float32], samples: Samples, labels: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Keep the k largest logits; a label that is to be kept and is not there replaces the smallest."""
        self.components(values.shape[1:])
        check_range(values, ~(np.abs(values) <= LIMIT), samples, self.name, LIMIT)
        logits = tensor_of(values)
        ids = kept_classes(logits, self.k, labels if self.label else None).sort(1).values
        gaps = (logits.amax(1, keepdim=True).double() - logits.gather(1, ids)).numpy()
        span = rounded(gaps.max(1, initial=0), np.inf)
        width = np.where(span == 0, 1, span).astype(np.float64)[:, None]
        codes = np.rint(LARGEST_CODE * np.sqrt(gaps / width)).clip(0, LARGEST_CODE).astype(np.int64)
        masses = log_masses(logits, ids, PACKED_TAIL_TEMPERATURES).numpy().astype(np.float16)
        top = logits.amax(1).numpy().astype(np.float16)
        return {
            "entries": _packed(ids.numpy(), codes, values.shape[1]),
            "scale": np.column_stack([top, span, masses]),
        }

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Return True for rows that a new encoding would give, up to rounding.

        Kept logits are within half a step of their codes, none is smaller than those a new encoding keeps,
        and top, range and the mass of the others agree.
        """
        rows = self._wrapped(
            {name: torch.from_numpy(part) for name, part in stored.items()}, values.shape[1:]
        )
        ids, codes, sound = (part.numpy() for part in rows.unpack())
        kept = np.take_along_axis(values, ids, axis=1).astype(np.float64)
        scale = stored["scale"].astype(np.float64)
        top, span = scale[:, :1], scale[:, 1:2]
        largest = values.max(1, keepdims=True).astype(np.float64)
        tolerance = slack * np.abs(values).max(1, keepdims=True).astype(np.float64)
        rounding = 2.0**-11 * np.abs(largest) + 2.0**-24
        # Gaps that round to the stored codes.
        gaps, around = largest - kept, 2 * tolerance + 2.0**-20 * np.abs(largest) + 2.0**-30
        lower, upper = (span * ((codes + half).clip(0) / LARGEST_CODE) ** 2 for half in (-0.501, 0.501))
        close = ((gaps >= lower - around) & (gaps <= upper + around)).all(1)
        close &= (np.abs(top - largest) <= rounding + tolerance)[:, 0]
        reach = gaps.max(1, keepdims=True)
        close &= (np.abs(span - reach) <= 2.0**-9 * reach + 2.0**-23 + 2 * tolerance)[:, 0]
        # The smallest entry may be the label's; all others must be among the k largest.
        least = -np.sort(-values, axis=1)[:, self.k - 1]
        lowest = np.sort(kept, axis=1)[:, 1 if self.label else 0]
        chosen = lowest >= least - 2 * tolerance[:, 0]
        logits = tensor_of(values)
        masses = log_masses(logits, torch.from_numpy(ids), PACKED_TAIL_TEMPERATURES).numpy()
        # The mass changes with the dropped logits and with the row's maximum.
        bound = 2.0**-11 * np.abs(masses) + 2.0**-25 + 2 * tolerance
        same_mass = (np.abs(scale[:, 2:] - masses) <= bound).all(1)
        agreed: NDArray[np.bool_] = sound & close & chosen & same_mass
        return agreed

    def rows(self, components: Mapping[str, torch.Tensor], row_shape: tuple[int, ...]) -> PackedTopKRows:
        """Wrap the stored bits and scales.

        Raises:
            ValueError: a row without k class ids. Rows are checked here, on the CPU, because a check on a GPU
                would synchronize.
        """
        rows = self._wrapped(components, row_shape)
        rows.check()
        return rows

    def _wrapped(self, components: Mapping[str, torch.Tensor], row_shape: tuple[int, ...]) -> PackedTopKRows:
        return PackedTopKRows(components["entries"], components["scale"], self.k, row_shape[0])


def _packed(ids: NDArray[np.int64], codes: NDArray[np.int64], classes: int) -> NDArray[np.uint8]:
    """Return the bits of sorted class ids and codes `(n, k)`, as `PackedTopKRows` describes them."""
    rows, kept = ids.shape
    low = low_bits(classes, kept)
    high = kept + ((classes - 1) >> low)
    bits = np.zeros((rows, high + kept * (low + CODE_BITS)), dtype=np.uint8)
    np.put_along_axis(bits, (ids >> low) + np.arange(kept), 1, axis=1)
    bits[:, high : high + kept * low] = _bits(ids, low)
    bits[:, high + kept * low :] = _bits(codes, CODE_BITS)
    return np.packbits(bits, axis=1, bitorder="little")


def _bits(numbers: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Return the lowest bits of numbers `(n, k)` as `(n, k * width)`."""
    found: NDArray[np.int64] = numbers[:, :, None] >> np.arange(width) & 1
    return found.reshape(len(numbers), numbers.shape[1] * width)
