"""Encoding of four bits a class, for logits at temperatures at which top-k rows lose too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.encodings.base import Component, check_range
from coursepack.data.encodings.int8 import LIMIT, rounded
from coursepack.errors import RecipeError
from coursepack.kernels import Int4Rows
from coursepack.kernels.int4 import LARGEST_CODE, LARGEST_GAP, OFFSET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples

UNREACHED = 50
"""One class in so many is beyond the range of its row."""
SHORTEST = 2.0**-24
"""Least range, the smallest float16: rows of equal logits have one too."""


@dataclass(frozen=True)
class Int4:
    """Encoding `top - range q (q + 15) / 450` with q from 0 to 15, and float16 top logit and range per row.

    Steps grow with the gap below the top logit: the likelier a class, the more its error counts. The range
    reaches all logits but the lowest `C // 50`, which are raised to its end: their probabilities are small,
    and a few classes far below the others would make all steps larger.
    """

    name: str = "int4"
    exact: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that describe the encoding."""
        return {"name": self.name}

    def components(self, row_shape: tuple[int, ...]) -> dict[str, Component]:
        """Return `q`, two classes to a byte, and `scale`, top logit and range.

        Raises:
            RecipeError: the rows are not logits.
        """
        if len(row_shape) != 1:
            raise RecipeError(f"encoding {self.name} is for logits, got rows {row_shape}")
        return {"q": Component("uint8", (-(-row_shape[0] // 2),)), "scale": Component("float16", (2,))}

    def encode(
        self, values: NDArray[np.float32], samples: Samples, labels: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Round every gap to the nearest of 16 levels."""
        (size,) = self.components(values.shape[1:])["q"].row_shape
        check_range(values, ~(np.abs(values) <= LIMIT), samples, self.name, LIMIT)
        top = values.max(1, keepdims=True)
        gaps = top.astype(np.float64) - values
        span = rounded(_reach(gaps).clip(SHORTEST), np.inf)
        parts = gaps / span.astype(np.float64)[:, None]
        codes = np.rint(_code(LARGEST_GAP * parts)).clip(0, LARGEST_CODE).astype(np.uint8)
        q = codes[:, :size].copy()
        q[:, : codes.shape[1] - size] |= codes[:, size:] << 4
        return {"q": q, "scale": np.column_stack([top[:, 0].astype(np.float16), span])}

    def agrees(
        self, values: NDArray[np.float32], stored: Mapping[str, NDArray[Any]], slack: float
    ) -> NDArray[np.bool_]:
        """Return True for rows whose codes are of the nearest levels, up to rounding, and whose top logit and
        range agree."""
        tensors = {name: torch.from_numpy(part) for name, part in stored.items()}
        codes = self.rows(tensors, values.shape[1:]).codes().numpy().astype(np.float64)
        top, span = stored["scale"].astype(np.float64).T[:, :, None]
        largest = values.max(1, keepdims=True).astype(np.float64)
        gaps, tolerance = largest - values, slack * np.abs(values).max(1, keepdims=True).astype(np.float64)
        around = 2 * tolerance + 2.0**-20 * np.abs(largest) + 2.0**-30
        lower, upper = span * _halfway(codes - 1), span * _halfway(codes)
        upper[codes == LARGEST_CODE] = np.inf
        close = ((gaps >= lower - around) & (gaps <= upper + around)).all(1)
        close &= (np.abs(top - largest) <= 2.0**-11 * np.abs(largest) + 2.0**-24 + tolerance)[:, 0]
        reach = _reach(gaps)[:, None]
        agreed: NDArray[np.bool_] = (
            close & (np.abs(span - reach) <= 2.0**-9 * reach + 2.0**-23 + 2 * tolerance)[:, 0]
        )
        return agreed

    def rows(self, components: Mapping[str, torch.Tensor], row_shape: tuple[int, ...]) -> Int4Rows:
        """Wrap the stored codes, top logits and ranges."""
        return Int4Rows(components["q"], components["scale"], row_shape[0])


def _reach(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest gap of each row `(n,)`, but for the `C // 50` that are beyond its range."""
    last = gaps.shape[1] - 1 - gaps.shape[1] // UNREACHED
    found: NDArray[np.float64] = np.partition(gaps, last, axis=1)[:, last]
    return found


def _halfway(codes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the gap halfway between the levels of codes and the next ones, as a part of the range."""
    return ((codes + 0.5) * (codes + 0.5 + OFFSET) + 0.25) / LARGEST_GAP


def _code(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return numbers that round to the codes of the nearest levels `q (q + OFFSET)`."""
    codes: NDArray[np.float64] = (np.sqrt(4 * gaps + OFFSET**2 - 1) - OFFSET) / 2
    return codes
