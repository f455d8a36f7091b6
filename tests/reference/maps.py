"""Layers on maps `(N, C, H, W)` in float64, from their definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Maps = NDArray[np.float64]


def normalized(maps: Maps, weight: Maps, bias: Maps) -> Maps:
    """Batch normalization in training mode."""
    mean, var = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
    return (maps - mean) / np.sqrt(var + 1e-5) * weight[:, None, None] + bias[:, None, None]


def convolved(maps: Maps, kernel: Maps, bias: Maps | None = None) -> Maps:
    """Convolution of stride 1 with an odd, square kernel, padded to keep the size."""
    side, (height, width) = kernel.shape[2], maps.shape[2:]
    pad = (side // 2, side // 2)
    padded = np.pad(maps, ((0, 0), (0, 0), pad, pad))
    total = np.zeros((len(maps), len(kernel), height, width))
    for row in range(side):
        for column in range(side):
            window = padded[:, :, row : row + height, column : column + width]
            total += np.einsum("oc,nchw->nohw", kernel[:, :, row, column], window)
    return total if bias is None else total + bias[:, None, None]


def nearest(maps: Maps, size: tuple[int, int]) -> Maps:
    """Resized by nearest neighbour."""
    rows, columns = (np.arange(side) * own // side for side, own in zip(size, maps.shape[2:], strict=True))
    return maps[:, :, rows][:, :, :, columns]


def averaged(maps: Maps, side: int) -> Maps:
    """Means over a grid of equal cells, for sides that divide."""
    n, channels, height, width = maps.shape
    return maps.reshape(n, channels, side, height // side, side, width // side).mean((3, 5))
