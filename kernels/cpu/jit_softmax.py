"""Loops over the classes of one row, compiled. Imported at first use: numba is slow to import.

Rows are addresses of float32 values, padded to a multiple of `jit_convert.LOT` so that no loop has a
remainder; the padding has probability 0. `out` never overlaps another row, because LLVM would not vectorize
such a loop.
"""

from __future__ import annotations

from coursepack.kernels.cpu.jit_base import float32, njit
from coursepack.kernels.cpu.jit_convert import lots
from coursepack.kernels.cpu.jit_math import (
    SUMS,
    TINY,
    divergence_term,
    exp2,
    load,
    log,
    prefetch_lines,
    store,
    wide_vectors,
)

BLOCK = 256
"""Number of terms summed in float32 before the partial sum is added in float64."""


@njit(forceinline=True)
def block_end(start: int, length: int) -> int:
    """Return the end of the block that starts at `start`."""
    left = length - start
    return start + lots(left if left < BLOCK else BLOCK)


@njit(forceinline=True)
def each_block(size: int, length: int) -> int:
    """Return the part of `size` bytes to prefetch in every block of `length` terms.

    The CPU has few places for lines on their way from memory. Many prefetches at once fill them, and then
    every read waits.
    """
    return size * BLOCK // length if length > BLOCK else size


@njit(fastmath=SUMS)
def exponentials(
    logits: int, top: float, factor: float, out: int, length: int, ahead: int, size: int
) -> float:
    """Write `2^((logits - top) factor)` to `out` and return the sum.

    `size` bytes from the address `ahead` on are prefetched meanwhile.
    """
    wide_vectors()
    total, share = 0.0, each_block(size, length)
    for start in range(0, length, BLOCK):
        prefetch_lines(ahead + start // BLOCK * share, share)
        part = float32(0)
        for c in range(start, block_end(start, length)):
            value = exp2((load(logits, c) - top) * factor)
            store(out, c, value)
            part += value
        total += part
    return total


@njit(fastmath=SUMS)
def add_scaled(values: int, factor: float, out: int, length: int) -> None:
    """Add `factor values` to `out`."""
    wide_vectors()
    for c in range(lots(length)):
        store(out, c, load(out, c) + factor * load(values, c))


@njit(fastmath=SUMS)
def add_both_scaled(values: int, factor: float, own_factor: float, out: int, length: int) -> None:
    """Set `out` to `own_factor out + factor values`."""
    wide_vectors()
    for c in range(lots(length)):
        store(out, c, own_factor * load(out, c) + factor * load(values, c))


@njit(fastmath=SUMS)
def divergence(
    p: int,
    q: int,
    logits: int,
    top: float,
    inverse: float,
    log_total: float,
    scale_p: float,
    scale_q: float,
    slope: float,
    out: int,
    length: int,
    ahead: int,
    size: int,
) -> float:
    """Return KL(`scale_p p` || `scale_q q`) and write `slope (scale_q q - scale_p p)` to `out`.

    The log of `scale_q q` is `(logits - top) inverse - log_total`. `size` bytes from the address `ahead` on
    are prefetched meanwhile.
    """
    wide_vectors()
    total, share = 0.0, each_block(size, length)
    for start in range(0, length, BLOCK):
        prefetch_lines(ahead + start // BLOCK * share, share)
        part = float32(0)
        for c in range(start, block_end(start, length)):
            own, other = scale_p * load(p, c), scale_q * load(q, c)
            log_q = (load(logits, c) - top) * inverse - log_total
            part += divergence_term(own, other, log(own if own > TINY else TINY), log_q)
            store(out, c, slope * (other - own))
        total += part
    return total


@njit(fastmath=SUMS)
def weight_slopes(
    p: int, scale_p: float, logits: int, top: float, inverse: float, log_total: float, out: int, length: int
) -> None:
    """Write `log(scale_p p) - log q + 1` to `out`, without the 1 where the first logarithm is clamped."""
    wide_vectors()
    for c in range(lots(length)):
        log_q = (load(logits, c) - top) * inverse - log_total
        own = scale_p * load(p, c)
        step = float32(1) if own >= TINY else float32(0)
        store(out, c, log(own if own > TINY else TINY) - log_q + step)


@njit(fastmath=SUMS)
def scale(values: int, factor: float, length: int) -> None:
    """Multiply the values by a factor, in place."""
    wide_vectors()
    for c in range(lots(length)):
        store(values, c, factor * load(values, c))


@njit(fastmath=SUMS)
def dot(probs: int, values: int, length: int) -> float:
    """Return the sum of products, where zero times infinity is zero."""
    wide_vectors()
    total = 0.0
    for start in range(0, length, BLOCK):
        part = float32(0)
        for c in range(start, block_end(start, length)):
            prob = load(probs, c)
            part += float32(0) if prob == float32(0) else prob * load(values, c)
        total += part
    return total


@njit(fastmath=SUMS)
def moment(probs: int, logits: int, top: float, length: int) -> float:
    """Return `sum probs (logits - top)`, where zero times infinity is zero."""
    wide_vectors()
    total = 0.0
    for start in range(0, length, BLOCK):
        part = float32(0)
        for c in range(start, block_end(start, length)):
            prob = load(probs, c)
            part += float32(0) if prob == float32(0) else prob * (load(logits, c) - top)
        total += part
    return total
