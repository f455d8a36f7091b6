"""Compiled Philox4x32-10 (Salmon et al., SC 2011). Imported at first use, because importing numba is slow."""

from __future__ import annotations

import numpy as np
from numba import njit

_MULTIPLY_0 = np.uint64(0xD2511F53)
_MULTIPLY_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_BLOCK = 512
"""Number of samples encrypted before their words are written."""


@njit(cache=True, nogil=True, inline="always")
def _encrypt(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - unboxed words
    for _ in range(10):
        product_0 = _MULTIPLY_0 * c0
        product_1 = _MULTIPLY_1 * c2
        c0 = (product_1 >> _SHIFT) ^ c1 ^ k0
        c2 = (product_0 >> _SHIFT) ^ c3 ^ k1
        c1 = product_1 & _LOW
        c3 = product_0 & _LOW
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def philox_fill(counters: np.ndarray, key_0: np.uint64, key_1: np.uint64, out: np.ndarray) -> None:
    """Encrypt counters `(N, 4)` uint32 under a key of two 32-bit words into `out (N, 4)` uint32."""
    for n in range(counters.shape[0]):
        out[n, 0], out[n, 1], out[n, 2], out[n, 3] = _encrypt(
            np.uint64(counters[n, 0]),
            np.uint64(counters[n, 1]),
            np.uint64(counters[n, 2]),
            np.uint64(counters[n, 3]),
            np.uint64(key_0),
            np.uint64(key_1),
        )


@njit(cache=True, nogil=True)
def philox_draw(
    samples: np.ndarray, seed: np.uint64, view: int, purpose: int, step: int, out: np.ndarray
) -> int:
    """Write the words of counters `(sample, view, purpose + k * step)` under key `seed` to `out (N, 4 * K)`.

    `out` is uint32. Returns the smallest sample index, or 0 if none is negative, so that the caller can
    refuse negative indices.
    """
    smallest = 0
    key_0, key_1 = np.uint64(seed) & _LOW, np.uint64(seed) >> _SHIFT
    third = np.uint64(view)
    # Word by word, LLVM encrypts several samples per instruction; writing four words at a time prevents that.
    block = np.empty((4, _BLOCK), dtype=np.uint32)
    for start in range(0, samples.shape[0], _BLOCK):
        count = min(_BLOCK, samples.shape[0] - start)
        for k in range(0, out.shape[1], 4):
            fourth = np.uint64(purpose + k // 4 * step)
            for n in range(count):
                smallest = min(smallest, samples[start + n])
                sample = np.uint64(samples[start + n])
                block[0, n], block[1, n], block[2, n], block[3, n] = _encrypt(
                    sample & _LOW, sample >> _SHIFT, third, fourth, key_0, key_1
                )
            for n in range(count):
                for word in range(4):
                    out[start + n, k + word] = block[word, n]
    return smallest
