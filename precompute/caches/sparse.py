"""Logits from probabilities, of all classes or of a few.

The logits are logarithms, so that their softmax at the temperature of the probabilities gives these again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coursepack.errors import CacheError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST = 2.0**-40
"""Probability that stands for 0, which has no logarithm."""
SLACK = 1e-2
"""Tolerance of sums of probabilities, which float16 rounds."""


def logits_of_probs(probs: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Return logits `(n, C)` whose softmax at a temperature is `probs (n, C)`."""
    floored = np.maximum(probs.astype(np.float64), LEAST)
    return (temperature * np.log(floored)).astype(np.float32)


def spread_probs(
    ids: NDArray[np.int64], probs: NDArray[np.float32], classes: int, *, spread: bool = True
) -> NDArray[np.float32]:
    """Return probabilities `(n, C)` from those of k classes.

    Args:
        ids: class ids `(n, k)`.
        probs: their probabilities `(n, k)`.
        classes: number of classes C.
        spread: divide the missing mass among the other classes equally; otherwise they have none. Rounding
            may leave less than no mass, which counts as none.
    """
    count, k = ids.shape
    rest = np.zeros((count, 1), np.float64)
    if spread and classes > k:
        rest = np.maximum(1 - probs.astype(np.float64).sum(1, keepdims=True), 0) / (classes - k)
    dense = np.repeat(rest, classes, axis=1).astype(np.float32)
    np.put_along_axis(dense, ids, probs.astype(np.float32), axis=1)
    return dense


def check_probs(probs: NDArray[np.floating], where: str, *, whole: bool) -> None:
    """Check that rows `(n, ...)` hold probabilities.

    Args:
        probs: probabilities of all classes, or of some.
        where: file of the rows, for the error.
        whole: the rows have all classes, so that they sum to 1.

    Raises:
        CacheError: a row is not finite, is outside of 0 to 1, or has another sum.
    """
    flat = probs.reshape(len(probs), -1).astype(np.float64)
    sums = flat.sum(1)
    with np.errstate(invalid="ignore"):
        good = ((flat >= 0) & (flat <= 1 + SLACK)).all(1) & (sums <= 1 + SLACK)
        good &= (sums >= 1 - SLACK) | (not whole)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise CacheError(
            f"{where}: row {row} holds {_shown(flat[row])} (sum {sums[row]:.4g}), expected probabilities"
            f"{' that sum to 1' if whole else ''}"
        )


def check_ids(ids: NDArray[np.floating], classes: int, where: str) -> NDArray[np.int64]:
    """Return class ids `(n, k)` as integers after checking them.

    Raises:
        CacheError: an id is not a class, or a row names a class twice.
    """
    with np.errstate(invalid="ignore"):
        good = (ids >= 0) & (ids < classes) & (ids == np.rint(ids))
    if not good.all():
        row = int(np.flatnonzero(~good.all(1))[0])
        raise CacheError(
            f"{where}: row {row} has the class ids {_shown(ids[row])}, expected ids 0 to {classes - 1} of "
            "the "
            "source's classes"
        )
    whole = ids.astype(np.int64)
    twice = (np.diff(np.sort(whole, axis=1), axis=1) == 0).any(1)
    if twice.any():
        row = int(np.flatnonzero(twice)[0])
        raise CacheError(f"{where}: row {row} has the class ids {_shown(whole[row])}, one of them twice")
    return whole


def _shown(values: NDArray[np.generic]) -> str:
    more = ", ..." if len(values) > 6 else ""
    return ", ".join(f"{value:.4g}" for value in values[:6].tolist()) + more
