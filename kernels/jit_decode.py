"""Serial decoders of encoded rows, compiled. Loaded at first use: importing numba is slow.

Serial on purpose: a batch is decoded in tens of microseconds, and a parallel region would fight the student's
threads for the cores.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def int8_decode(q: np.ndarray, affine: np.ndarray, out: np.ndarray) -> None:
    """`affine[n, 1] + affine[n, 0] * q` of `q (N, D)` uint8 and `affine (N, 2)` into `out (N, D)` float32."""
    for n in range(q.shape[0]):
        scale, minimum = affine[n, 0], affine[n, 1]
        for d in range(q.shape[1]):
            out[n, d] = minimum + scale * np.float32(q[n, d])


@njit(cache=True, nogil=True)
def topk_decode(ids: np.ndarray, values: np.ndarray, fill: np.ndarray, out: np.ndarray) -> None:
    """`fill[n]` everywhere but `values (N, k)` at `ids (N, k)`, into `out (N, C)` float32."""
    for n in range(out.shape[0]):
        out[n, :] = fill[n]
        for i in range(ids.shape[1]):
            out[n, ids[n, i]] = values[n, i]


@njit(cache=True, nogil=True)
def bit_decode(bits: np.ndarray, out: np.ndarray) -> None:
    """+1 or -1 per bit of `bits (N, B)` uint8, highest bit first, into `out (N, D)` float32."""
    for n in range(out.shape[0]):
        for d in range(out.shape[1]):
            bit = (bits[n, d >> 3] >> (7 - (d & 7))) & 1
            out[n, d] = np.float32(2 * np.int64(bit) - 1)
