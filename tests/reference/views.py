"""Views in float64, from their definitions: resampling as dense matrices, blending as exact fractions.

Resampling (Pillow's, and torchvision's with `antialias=True`): output pixel i of a crop from `low` to `high`
is centred at low + (i + 1/2) s with s = (high - low) / size; source pixel j, centred at j + 1/2, weighs
max(0, 1 - |distance| / max(s, 1)) if it lies in the crop, in whole pixels outwards, and weights are
normalized. What lies outside the image is black and weighs as much. A crop that begins inside of the image
covers at least one of its pixels.
"""

from __future__ import annotations

import numpy as np

GRID = 65536


def edge(place, side):
    """A coordinate in 2**-16 of a side as pixels; within a step of the grid of a whole pixel, that one."""
    exact = place * side / GRID
    whole = np.rint(exact)
    return whole if abs(whole - exact) <= side / GRID else exact


def axis_matrix(start, length, side, size, *, flip=False):
    """Weights `(size, side)` of an image's rows in a crop's."""
    low, high = edge(start, side), edge(start + length, side)
    step = (high - low) / size
    first = int(np.floor(low))
    if start < GRID and low == high:
        first = min(first, side - 1)
    last = max(int(np.ceil(high)), first + 1)
    centers = low + (np.arange(size) + 0.5) * step
    places = np.arange(first, last)
    weights = np.maximum(0, 1 - abs(places + 0.5 - centers[:, None]) / max(step, 1))
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((size, side))
    inside = (places >= 0) & (places < side)
    matrix[:, places[inside]] = weights[:, inside]
    return matrix[::-1] if flip else matrix


def resized(image, box, size, flips=0):
    """Crop of one image `(H, W, C)` at `(size, size)` in float64: bit 1 mirrored, bit 2 upside down."""
    rows = axis_matrix(box[0], box[2], image.shape[0], size, flip=bool(flips & 2))
    columns = axis_matrix(box[1], box[3], image.shape[1], size, flip=bool(flips & 1))
    tall = np.tensordot(rows, image.astype(np.float64), axes=(1, 0))
    return np.tensordot(tall, columns, axes=(1, 1)).transpose(0, 2, 1)


def rounding_bound(image, box, size):
    """How far from `resized` weights of 13 bits, rounded twice, may get: levels.

    Each of an axis' n weights is off by half a step at most, and the largest takes up what is left of their
    sum, n / 2 steps more: n steps of 2**-13 times 255 levels. Rounding to uint8 adds half a level per axis.
    """
    total = 1.0
    for axis in range(2):
        side = image.shape[axis]
        step = abs(edge(box[axis] + box[2 + axis], side) - edge(box[axis], side)) / size
        total += (2 * max(step, 1) + 1) * 255 / 8192
    return total + 1e-9


def blended(first, second, share):
    """`first` with a share in 2**-16 and `second` with the rest, rounded half up by exact integers."""
    total = first.astype(object) * int(share) + second.astype(object) * (GRID - int(share))
    return ((2 * total + GRID) // (2 * GRID)).astype(np.uint8)


def pixel_edge(place, size):
    """A coordinate in 2**-16 of a rendering as a whole pixel, rounded half up."""
    return (2 * int(place) * size + GRID) // (2 * GRID)
