"""Philox4x32-10 (Salmon et al., SC 2011), compiled. Loaded at first use: importing numba is slow."""

from __future__ import annotations

import numpy as np
from numba import njit

_MULTIPLY_0 = np.uint64(0xD2511F53)
_MULTIPLY_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@njit(cache=True, nogil=True)
def philox_fill(counters: np.ndarray, key_0: np.uint64, key_1: np.uint64, out: np.ndarray) -> None:
    """Encrypt counters `(N, 4)` uint32 under one key of two 32-bit words into `out (N, 4)` uint32."""
    for n in range(counters.shape[0]):
        c0 = np.uint64(counters[n, 0])
        c1 = np.uint64(counters[n, 1])
        c2 = np.uint64(counters[n, 2])
        c3 = np.uint64(counters[n, 3])
        k0 = np.uint64(key_0)
        k1 = np.uint64(key_1)
        for _ in range(10):
            product_0 = _MULTIPLY_0 * c0
            product_1 = _MULTIPLY_1 * c2
            c0 = (product_1 >> _SHIFT) ^ c1 ^ k0
            c2 = (product_0 >> _SHIFT) ^ c3 ^ k1
            c1 = product_1 & _LOW
            c3 = product_0 & _LOW
            k0 = (k0 + _WEYL_0) & _LOW
            k1 = (k1 + _WEYL_1) & _LOW
        out[n, 0] = c0
        out[n, 1] = c1
        out[n, 2] = c2
        out[n, 3] = c3
