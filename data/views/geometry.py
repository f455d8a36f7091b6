"""Ops on geometry: they change a crop box, from which the source's pixels are resampled once.

Sizes and paddings are in pixels of the current frame. The frame begins as a square of side `reference_size`
that spans the whole image; `resize` gives it the image's own aspect ratio, and each crop leaves a frame of
the crop's size. Distributions are torchvision's (transforms v2, 0.26).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from coursepack.config import Config
from coursepack.data import exact
from coursepack.data.randomness import below, between, chance
from coursepack.data.views.params import GRID, MIRRORED, UPSIDE_DOWN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coursepack.data.randomness import Draws

    Numbers = NDArray[np.int64]

Pixels = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]

ATTEMPTS = 10
"""Maximum number of attempts to draw a box that fits, as in torchvision."""


@dataclass
class Frame:
    """Crop boxes of N images while their ops are drawn."""

    boxes: Numbers
    """Crop box `(N, 4)`: top, left, height, width in 2**-16 of the image's sides."""
    flips: NDArray[np.uint8]
    """`(N,)` bits `MIRRORED` and `UPSIDE_DOWN`."""
    sizes: Numbers
    """Height and width `(N, 2)` of the images in pixels."""
    sides: Numbers
    """Height and width `(N, 2)` of the current frame in its own pixels."""
    reference_size: int

    @classmethod
    def full(cls, sizes: NDArray[np.int32], reference_size: int) -> Frame:
        """Return the frames of whole images of the given sizes."""
        boxes = np.zeros((len(sizes), 4), dtype=np.int64)
        boxes[:, 2:] = GRID
        sides = np.full((len(sizes), 2), reference_size, dtype=np.int64)
        return cls(boxes, np.zeros(len(sizes), np.uint8), sizes.astype(np.int64), sides, reference_size)

    def crop(self, start: Numbers, length: Numbers, frame_sides: Numbers, *, sides: Numbers | int) -> None:
        """Crop each frame to the box from `start` to `start + length`, both `(N, 2)`.

        Start and length are in units in which the current frames measure `frame_sides (N, 2)`. The cropped
        frames measure `sides`.
        """
        for axis, bit in ((0, UPSIDE_DOWN), (1, MIRRORED)):
            first = np.where(
                self.flips & bit, frame_sides[:, axis] - start[:, axis] - length[:, axis], start[:, axis]
            )
            extent = self.boxes[:, 2 + axis]
            low = extent * first // frame_sides[:, axis]
            high = extent * (first + length[:, axis]) // frame_sides[:, axis]
            self.boxes[:, axis] += low
            self.boxes[:, 2 + axis] = np.maximum(high - low, 1)
        self.sides = np.broadcast_to(np.asarray(sides, dtype=np.int64), self.sides.shape)


class PadCrop(Config):
    """Pad each side with black pixels, then crop the original size at a random whole pixel."""

    op: Literal["pad_crop"] = "pad_crop"
    padding: Pixels
    """Padding in pixels of the frame."""

    def draw(self, draws: Draws, frame: Frame) -> None:
        """Move each box by -padding to padding pixels vertically and horizontally."""
        shift = below(draws.words()[:, :2], 2 * self.padding + 1) - self.padding
        frame.crop(shift, frame.sides, frame.sides, sides=frame.sides)


class ResizedCrop(Config):
    """Crop a box of random area and aspect ratio, on whole pixels of the image, and resize it."""

    op: Literal["resized_crop"] = "resized_crop"
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area, as shares of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height, drawn uniformly on a logarithmic scale."""

    @model_validator(mode="after")
    def _ranges(self) -> ResizedCrop:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}, expected 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}, expected 0 < smallest <= largest")
        return self

    def draw(self, draws: Draws, frame: Frame) -> None:
        """Draw a box within each current box."""
        image = np.maximum(1, np.rint(frame.boxes[:, 2:] * frame.sizes / GRID)).astype(np.int64)
        start, length = random_boxes(draws, image, self.scale, self.ratio)
        missing = np.flatnonzero(length[:, 0] == 0)
        start[missing], length[missing] = _largest_boxes(image[missing], self.ratio)
        frame.crop(start, length, image, sides=frame.reference_size)


class Resize(Config):
    """Resize the shorter side to a number of pixels; a center crop after it keeps the aspect ratio."""

    op: Literal["resize"] = "resize"
    shorter: Pixels
    """Length of the shorter side in pixels."""

    def draw(self, draws: Draws, frame: Frame) -> None:
        """Give the frame the aspect ratio of the crop box."""
        seen = np.maximum(1, np.rint(frame.boxes[:, 2:] * frame.sizes / GRID)).astype(np.int64)
        frame.sides = self.shorter * seen // seen.min(axis=1, keepdims=True)


class CenterCrop(Config):
    """Crop the center of the frame; outside of a smaller frame is black."""

    op: Literal["center_crop"] = "center_crop"
    size: Pixels
    """Side in pixels of the frame."""

    def draw(self, draws: Draws, frame: Frame) -> None:
        """Narrow each box to its center."""
        # As torchvision: offsets round half to even, and a smaller frame is padded first.
        missing = np.maximum(self.size - frame.sides, 0)
        start = np.where(
            missing > 0, -(missing // 2), np.rint((frame.sides - self.size) / 2).astype(np.int64)
        )
        frame.crop(start, np.full_like(start, self.size), frame.sides, sides=self.size)


class HorizontalFlip(Config):
    """Flip left and right."""

    op: Literal["horizontal_flip"] = "horizontal_flip"
    probability: Probability = 0.5

    def draw(self, draws: Draws, frame: Frame) -> None:
        """Toggle the flip bit of randomly selected images."""
        frame.flips ^= chance(draws.words()[:, 0], self.probability).astype(np.uint8) * np.uint8(MIRRORED)


class VerticalFlip(Config):
    """Flip top and bottom."""

    op: Literal["vertical_flip"] = "vertical_flip"
    probability: Probability = 0.5

    def draw(self, draws: Draws, frame: Frame) -> None:
        """Toggle the flip bit of randomly selected images."""
        frame.flips ^= chance(draws.words()[:, 0], self.probability).astype(np.uint8) * np.uint8(UPSIDE_DOWN)


GEOMETRY_OPS = (PadCrop, ResizedCrop, Resize, CenterCrop, HorizontalFlip, VerticalFlip)


def random_boxes(
    draws: Draws,
    sides: Numbers,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    smaller: bool = False,
) -> tuple[Numbers, Numbers]:
    """Draw boxes of random area and aspect ratio on whole pixels.

    Args:
        draws: random words, one stream per attempt.
        sides: height and width `(N, 2)` in pixels.
        scale: bounds of the area, as shares.
        ratio: bounds of width / height, drawn uniformly on a logarithmic scale.
        smaller: require boxes smaller than the image on both sides, as for random erasing.

    Returns:
        Start and length `(N, 2)`; length 0 if no attempt fits.
    """
    start, length = np.zeros_like(sides), np.zeros_like(sides)
    low, high = (round(bound * GRID) for bound in scale)
    log_low, log_high = exact.log(np.array(ratio))
    pending = np.arange(len(sides))
    for attempt in range(ATTEMPTS):
        words = draws.select(pending).words(attempt)
        limits = sides[pending]
        area = limits.prod(axis=1) * between(words[:, 0], low, high) / GRID
        shape = exact.exp(log_low + (log_high - log_low) * (words[:, 1] / 2.0**32))
        box = np.rint(np.sqrt(np.stack([area / shape, area * shape], axis=1))).astype(np.int64)
        room = limits - box
        fits = ((room > 0) if smaller else (room >= 0)).all(axis=1) & (box > 0).all(axis=1)
        rows = pending[fits]
        start[rows] = below(words[fits, 2:], room[fits] + 1)
        length[rows] = box[fits]
        pending = pending[~fits]
        if len(pending) == 0:
            break
    return start, length


def _largest_boxes(sides: Numbers, ratio: tuple[float, float]) -> tuple[Numbers, Numbers]:
    """Return the largest centered box with an allowed aspect ratio."""
    height, width = sides[:, 0], sides[:, 1]
    narrowest = np.rint(width / ratio[0]).astype(np.int64)
    widest = np.rint(height * ratio[1]).astype(np.int64)
    length = np.stack([np.minimum(height, narrowest), np.minimum(width, widest)], axis=1)
    length = np.maximum(length, 1)
    return (sides - length) // 2, length
