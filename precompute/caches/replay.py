"""Crops and flips of TinyViT, drawn again from the seeds of its records.

An image's augmentations are drawn from NumPy's PCG64 with the record's seed: up to ten attempts at a crop of
random area and aspect ratio, two numbers each, then its position, then the flip. The generator's stream is
stable across versions of NumPy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from coursepack.data.views.recorded import rows_of_crops

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

SCALE = (0.08, 1.0)
"""Smallest and largest area of a crop, as shares of the image's."""
RATIO = (3 / 4, 4 / 3)
"""Smallest and largest width / height."""
ATTEMPTS = 10


def crops_of_seeds(seeds: NDArray[np.int32], sides: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return view parameters `(N, 5)` for seeds `(N,)` and heights and widths `(N, 2)` of the images."""
    crops = [
        _crop(np.random.Generator(np.random.PCG64(seed)), height, width)
        for seed, (height, width) in zip(seeds.tolist(), sides.tolist(), strict=True)
    ]
    values = np.array(crops, np.int64).reshape(-1, 5)
    return rows_of_crops(values[:, :2], values[:, :2] + values[:, 2:4], sides, values[:, 4].astype(bool))


def _crop(rng: Generator, height: int, width: int) -> tuple[int, int, int, int, bool]:
    """Draw top, left, height and width of a crop in pixels, and whether it is flipped."""
    low, high = (math.log(bound) for bound in RATIO)
    for _ in range(ATTEMPTS):
        area = _between(rng, *SCALE) * (width * height)
        ratio = math.exp(_between(rng, low, high))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if across <= width and down <= height:
            top, left = _up_to(rng, height - down), _up_to(rng, width - across)
            return top, left, down, across, bool(rng.random() < 0.5)
    down, across = _central(height, width)
    return (height - down) // 2, (width - across) // 2, down, across, bool(rng.random() < 0.5)


def _between(rng: Generator, low: float, high: float) -> float:
    return float(rng.random()) * (high - low) + low


def _up_to(rng: Generator, last: int) -> int:
    return min(int(rng.random() * (last + 1)), last)


def _central(height: int, width: int) -> tuple[int, int]:
    """Return height and width of the largest central crop with an allowed aspect ratio."""
    if width / height < RATIO[0]:
        return round(width / RATIO[0]), width
    if width / height > RATIO[1]:
        return height, round(height * RATIO[1])
    return height, width
