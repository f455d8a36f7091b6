"""Pixel kernels in integer arithmetic, compiled. Loaded at first use: importing numba is slow."""

from __future__ import annotations

import numpy as np
from numba import njit

_BITS = 11
_ONE = 1 << _BITS
_HALF = 1 << (2 * _BITS - 1)


@njit(cache=True, nogil=True)
def _taps(start: int, length: int, source: int, out: int, first: np.ndarray, weight: np.ndarray) -> None:
    """Where each of `out` pixel centres falls among `source` pixels: lower neighbour and upper's weight."""
    unit = 2 * out * 65536
    for i in range(out):
        position = (start * 2 * out + (2 * i + 1) * length) * source - 65536 * out
        first[i] = position // unit
        weight[i] = ((position - first[i] * unit) * _ONE + unit // 2) // unit


@njit(cache=True, nogil=True)
def crop_resize(pixels: np.ndarray, boxes: np.ndarray, out: np.ndarray) -> None:
    """Bilinear crops of `pixels (N, H, W, C)` by `boxes (N, 4)` into `out (N, h, w, C)`, black outside."""
    count, height, width, channels = pixels.shape
    out_height, out_width = out.shape[1], out.shape[2]
    row, row_weight = np.empty(out_height, np.int64), np.empty(out_height, np.int64)
    column, column_weight = np.empty(out_width, np.int64), np.empty(out_width, np.int64)
    for n in range(count):
        _taps(boxes[n, 0], boxes[n, 2], height, out_height, row, row_weight)
        _taps(boxes[n, 1], boxes[n, 3], width, out_width, column, column_weight)
        for y in range(out_height):
            for x in range(out_width):
                for c in range(channels):
                    total = 0
                    for dy in range(2):
                        yy = row[y] + dy
                        wy = row_weight[y] if dy == 1 else _ONE - row_weight[y]
                        if yy < 0 or yy >= height or wy == 0:
                            continue
                        for dx in range(2):
                            xx = column[x] + dx
                            wx = column_weight[x] if dx == 1 else _ONE - column_weight[x]
                            if 0 <= xx < width:
                                total += wy * wx * np.int64(pixels[n, yy, xx, c])
                    out[n, y, x, c] = np.uint8((total + _HALF) >> (2 * _BITS))
