"""Reading of rows of four bits a class, compiled. Imported at first use: numba is slow to import."""

from __future__ import annotations

import numpy as np

from coursepack.kernels.cpu.jit_base import float32, int64, jit, njit
from coursepack.kernels.cpu.jit_convert import LOT, fill, lots
from coursepack.kernels.cpu.jit_math import SUMS, high_code, load_uint8, low_code, store, wide_vectors

OFFSET = float32(15)
STEP = float32(1 / 450)


@njit(forceinline=True)
def below(top: float, code: float, step: float) -> float:
    """Return the logit of a code."""
    return top - code * (code + OFFSET) * step


@njit(forceinline=True)
def read_byte(row: int, c: int, half: int, top: float, step: float, out: int) -> None:
    """Decode the two classes of a byte."""
    byte = load_uint8(row, c)
    store(out, c, below(top, low_code(byte), step))
    store(out, half + c, below(top, high_code(byte), step))


@njit(fastmath=SUMS)
def read_int4(row: int, classes: int, length: int, top: float, span: float, out: int) -> float:
    """Decode a row, padded with -inf up to `length`, and return its top logit."""
    wide_vectors()
    step, half = span * STEP, (classes + 1) >> 1
    fill(out, classes, length, float32(-np.inf))
    pairs = classes - half
    whole = lots(pairs)
    for c in range(whole):
        read_byte(row, c, half, top, step, out)
    if pairs > whole:
        first = pairs - LOT if whole else 0
        for c in range(first, first + LOT if whole else pairs):
            read_byte(row, c, half, top, step, out)
    if half > pairs:
        store(out, pairs, below(top, low_code(load_uint8(row, pairs)), step))
    return top


@jit
def int4_decode(q: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Decode `q (N, B)` uint8 with `scale (N, 2)` float32 to `out (N, C)` float32, all contiguous."""
    classes, size = out.shape[1], q.shape[1]
    source, target = int64(q.ctypes.data), int64(out.ctypes.data)
    for n in range(out.shape[0]):
        read_int4(source + n * size, classes, classes, scale[n, 0], scale[n, 1], target + 4 * n * classes)
