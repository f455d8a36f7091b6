"""Loops over the classes of one row, compiled. Loaded at first use: importing numba is slow.

Rows of scratch are whole lots of classes long (`jit_convert.LOT`), so that no loop has a rest; what lies
beyond the classes holds probability 0. Unless it says otherwise, `out` is none of the other rows: a loop
whose rows overlap is not vectorised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.kernels.jit_base import float32, njit
from coursepack.kernels.jit_convert import lots, places
from coursepack.kernels.jit_math import SUMS, TINY, divergence_term, exp2, log, wide_vectors

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1024
"""So many terms are added up in float32, and these sums in float64."""


@njit(inline="always")
def block(start: int, length: int) -> range:
    """The places of a block, as far as lots are whole."""
    return places(start, lots(min(BLOCK, length - start)))


@njit(fastmath=SUMS)
def exponentials(logits: np.ndarray, top: float, factor: float, out: np.ndarray) -> float:
    """`2^((logits - top) factor)` into `out`; their sum."""
    wide_vectors()
    total = 0.0
    for start in range(0, len(out), BLOCK):
        part = float32(0)
        for c in block(start, len(out)):
            value = exp2((logits[c] - top) * factor)
            out[c] = value
            part += value
        total += part
    return total


@njit(fastmath=SUMS)
def add_scaled(values: np.ndarray, factor: float, out: np.ndarray) -> None:
    """Add `factor values` to `out`."""
    wide_vectors()
    for c in range(lots(len(out))):
        out[c] += factor * values[c]


@njit(fastmath=SUMS)
def divergence(
    p: np.ndarray,
    q: np.ndarray,
    logits: np.ndarray,
    top: float,
    inverse: float,
    log_total: float,
    scale_p: float,
    scale_q: float,
    slope: float,
    out: np.ndarray,
) -> float:
    """KL of `scale_p p` to `scale_q q`, whose log is `(logits - top) inverse - log_total`.

    `slope (scale_q q - scale_p p)` goes to `out`.
    """
    wide_vectors()
    total = 0.0
    for start in range(0, len(p), BLOCK):
        part = float32(0)
        for c in block(start, len(p)):
            own, other = scale_p * p[c], scale_q * q[c]
            log_q = (logits[c] - top) * inverse - log_total
            part += divergence_term(own, other, log(own if own > TINY else TINY), log_q)
            out[c] = slope * (other - own)
        total += part
    return total


@njit(fastmath=SUMS)
def weight_slopes(
    p: np.ndarray,
    scale_p: float,
    logits: np.ndarray,
    top: float,
    inverse: float,
    log_total: float,
    out: np.ndarray,
) -> None:
    """`log(scale_p p) - log q + 1`; where the first is floored, and so constant, without the 1."""
    wide_vectors()
    for c in range(lots(len(p))):
        log_q = (logits[c] - top) * inverse - log_total
        own = scale_p * p[c]
        step = float32(1) if own >= TINY else float32(0)
        out[c] = log(own if own > TINY else TINY) - log_q + step


@njit(fastmath=SUMS)
def dot(probs: np.ndarray, values: np.ndarray) -> float:
    """Sum of products, where zero times infinity is zero."""
    wide_vectors()
    total = 0.0
    for start in range(0, len(probs), BLOCK):
        part = float32(0)
        for c in block(start, len(probs)):
            part += float32(0) if probs[c] == float32(0) else probs[c] * values[c]
        total += part
    return total
