"""Made-up photographs as JPEG files, in folders of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

FILE_SIDES = (375, 500)
"""Height and width in pixels."""


def photograph(rng: np.random.Generator) -> np.ndarray:
    """Return an image that compresses like a photograph: smooth, with some noise."""
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 12, 16)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, FILE_SIDES, mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def write_photographs(root: Path, count: int, classes: int, rng: np.random.Generator) -> None:
    """Write JPEG files to a folder per class in `train`."""
    for number in range(count):
        folder = root / "train" / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(photograph(rng))
        # Two sizes, because a small source with images of one size is kept decoded in memory.
        image = image.transpose(Image.Transpose.ROTATE_90) if number % 2 else image
        image.save(folder / f"{number}.jpg", quality=90)
