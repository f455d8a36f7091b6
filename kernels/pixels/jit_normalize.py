"""Normalization of pixels, compiled. Imported at first use, because numba is slow to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import njit

if TYPE_CHECKING:
    import numpy as np


@njit(cache=True, nogil=True)
def look_up(pixels: np.ndarray, channel: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Set `out[n, c, y, x] = table[c, pixels[n, y, x, channel[c]]]`."""
    count, height, width, channels = pixels.shape
    if channels == len(channel) == 3:
        # The usual case: read every pixel once.
        for n in range(count):
            flat, planes = pixels[n].reshape(-1), out[n].reshape(3, -1)
            for k in range(height * width):
                planes[0, k] = table[0, flat[3 * k]]
                planes[1, k] = table[1, flat[3 * k + 1]]
                planes[2, k] = table[2, flat[3 * k + 2]]
        return
    for n in range(count):
        for c in range(len(channel)):
            values = table[c]
            flat, plane = pixels[n].reshape(-1), out[n, c].reshape(-1)
            index = channel[c]
            for k in range(height * width):
                plane[k] = values[flat[index]]
                index += channels
