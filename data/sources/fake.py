"""Synthetic images of any size and number of classes that a network can learn to tell apart.

Each class has a smooth random pattern. An image is its class's pattern, shifted by a few pixels and overlaid
with a part of another class's pattern and with noise. All of this is integer arithmetic on Philox words, so
an image is the same on every platform. Images are drawn independently, so opening a large source costs
nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coursepack.canonical import fingerprint
from coursepack.data.randomness import Purpose, below, random_words
from coursepack.data.sources.base import MAX_IN_MEMORY, checksums, fields_only, sampled
from coursepack.errors import RecipeError, UnknownName

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources.base import Pixels, Source, Spec

DEFAULTS = {"classes": 10, "size": 32, "samples": 10_000, "channels": 3, "seed": 0}
TEST_SHARE = 5
"""Train images per test image."""
CELLS = 4
"""Random values along each side of a pattern; pixels between them are interpolated."""
STEPS = 16
"""Denominator of the other class's share, which is 0 to 7 sixteenths."""
_PIECE = 256
_PATTERNS, _NOISE, _CHOICES = 0, 1, 2
"""Views of the generator; the test split adds 2 to the last two."""


@dataclass(frozen=True)
class Fake:
    """Source of synthetic images."""

    name: str
    classes: int
    size: int
    """Side in pixels."""
    samples: int
    channels: int
    seed: int
    split: str

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(N,)`: sample index modulo the number of classes."""
        return np.arange(self.samples, dtype=np.int64) % self.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class ids as text."""
        return tuple(str(label) for label in range(self.classes))

    @functools.cached_property
    def in_memory(self) -> NDArray[np.uint8] | None:
        """All images, drawn at first use, or None if they are larger than `MAX_IN_MEMORY`."""
        if self.samples * self.size**2 * self.channels > MAX_IN_MEMORY:
            return None
        return self._draw(np.arange(self.samples))

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over name, options and the content of 64 images."""
        numbers = {name: getattr(self, name) for name in DEFAULTS}
        content = self.contents(sampled(self.samples)).tolist()
        return fingerprint({"name": self.name, **numbers, "content": content})

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Return height and width `(n, 2)`, the same for all images."""
        return np.full((len(samples), 2), self.size, dtype=np.int32)

    def pixels(self, samples: Samples) -> Pixels:
        """Return an array if `in_memory` is available, else a list."""
        return list(self._draw(np.asarray(samples))) if self.in_memory is None else self.in_memory[samples]

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of each image's pixels."""
        return checksums(
            self.pixels(samples) if "in_memory" in vars(self) else self._draw(np.asarray(samples))
        )

    def path(self, sample: int) -> None:
        """Return None: samples have no file of their own."""

    def check(self) -> None:
        """Do nothing: there are no files that could be damaged."""

    def __getstate__(self) -> dict[str, Any]:
        return fields_only(self)

    @functools.cached_property
    def _patterns(self) -> NDArray[np.uint8]:
        """Patterns `(classes, side, side, channels)`, larger than an image by the largest shift."""
        side = self.size + self._largest_shift
        count = self.classes * CELLS * CELLS * self.channels
        words = random_words(self.seed, np.arange(-(-count // 4)), _PATTERNS, Purpose.FAKE).reshape(-1)
        cells = (words[:count] >> np.uint32(24)).astype(np.uint8)
        grids = cells.reshape(self.classes, CELLS, CELLS, self.channels)
        out = np.empty((self.classes, side, side, self.channels), dtype=np.uint8)
        for start in range(0, self.classes, _PIECE):
            rows = _interpolated(grids[start : start + _PIECE], side, 1)
            out[start : start + _PIECE] = _interpolated(rows, side, 2)
        return out

    @property
    def _largest_shift(self) -> int:
        return self.size // 8

    def _draw(self, samples: Samples) -> NDArray[np.uint8]:
        out = np.empty((len(samples), self.size, self.size, self.channels), dtype=np.uint8)
        for start in range(0, len(samples), _PIECE):
            out[start : start + _PIECE] = self._draw_piece(samples[start : start + _PIECE])
        return out

    def _draw_piece(self, samples: Samples) -> NDArray[np.uint8]:
        view = 2 * (self.split == "test")
        words = random_words(self.seed, samples, _CHOICES + view, Purpose.FAKE)
        windows = np.lib.stride_tricks.sliding_window_view(self._patterns, (self.size, self.size), (1, 2))
        top = below(words[:, 0], self._largest_shift + 1)
        left = below(words[:, 1], self._largest_shift + 1)
        labels = samples % self.classes
        other = (labels + below(words[:, 2], self.classes)) % self.classes
        share = below(words[:, 3], STEPS // 2).astype(np.uint16)[:, None, None, None]
        # (n, channels, H, W) in 16 bits; the weights of the two patterns sum to STEPS.
        mixed = windows[labels, top, left].astype(np.uint16) * (STEPS - share)
        mixed += windows[other, top, left].astype(np.uint16) * share
        mixed //= STEPS
        noise = self._noise(samples, _NOISE + view).transpose(0, 3, 1, 2)
        pixels = (mixed * np.uint16(3) + noise) >> 2
        return pixels.astype(np.uint8).transpose(0, 2, 3, 1)

    def _noise(self, samples: Samples, view: int) -> NDArray[np.uint8]:
        length = self.size**2 * self.channels
        blocks = -(-length // 16)
        counters = samples[:, None] * blocks + np.arange(blocks)
        words = random_words(self.seed, counters.reshape(-1), view, Purpose.FAKE)
        noise = words.astype("<u4", copy=False).view(np.uint8).reshape(len(samples), -1)[:, :length]
        return noise.reshape(-1, self.size, self.size, self.channels)


def _interpolated(grids: NDArray[np.uint8], side: int, axis: int) -> NDArray[np.uint8]:
    """Interpolate grids `(n, H, W, channels)` to `side` along one axis, in 16-bit arithmetic."""
    steps = max(side - 1, 1)
    position = np.arange(side) * (CELLS - 1)
    low = np.minimum(position // steps, CELLS - 2)
    shape = [1, 1, 1, 1]
    shape[axis] = side
    weight = ((position - low * steps) * 256 // steps).astype(np.uint16).reshape(shape)
    total = np.take(grids, low, axis) * (256 - weight)
    total += np.take(grids, low + 1, axis) * weight
    interpolated: NDArray[np.uint8] = (total >> 8).astype(np.uint8)
    return interpolated


def fake(spec: Spec, root: Path | None) -> Source:
    """Return synthetic images: `fake,classes=100,size=32,samples=50000,channels=3,seed=0:train`.

    The test split has the same patterns and a fifth as many images.
    """
    if root is not None:
        raise RecipeError("source 'fake' has no files: leave --root out")
    numbers = _numbers(spec)
    given = "".join(f",{name}={number}" for name, number in numbers.items() if number != DEFAULTS[name])
    if spec.split == "test":
        numbers["samples"] = -(-numbers["samples"] // TEST_SHARE)
    return Fake(f"{spec.name}{given}:{spec.split}", split=spec.split, **numbers)


def _numbers(spec: Spec) -> dict[str, int]:
    numbers = dict(DEFAULTS)
    for option in filter(None, spec.options.split(",")):
        name, _, text = option.partition("=")
        if name not in DEFAULTS:
            raise UnknownName(f"option of source {spec.name!r}", name, DEFAULTS)
        if not (text.isascii() and text.isdigit()):
            raise RecipeError(f"option {name} of source {spec.name!r} is {text!r}, expected a whole number")
        numbers[name] = int(text)
    for name in ("classes", "size", "samples"):
        if numbers[name] < 1:
            raise RecipeError(
                f"option {name} of source {spec.name!r} is {numbers[name]}, expected at least 1"
            )
    if numbers["channels"] not in (1, 3):
        raise RecipeError(
            f"option channels of source {spec.name!r} is {numbers['channels']}, expected 1 or 3"
        )
    if numbers["seed"] >= 1 << 64:
        raise RecipeError(
            f"option seed of source {spec.name!r} is {numbers['seed']}, expected less than 2**64"
        )
    return numbers


IMAGE_SHAPES = {
    "digits": {"classes": 10, "size": 8, "channels": 1},
    "cifar10": {"classes": 10, "size": 32, "channels": 3},
    "cifar100": {"classes": 100, "size": 32, "channels": 3},
    "cinic10": {"classes": 10, "size": 32, "channels": 3},
    "tiny-imagenet": {"classes": 200, "size": 64, "channels": 3},
    "imagenet": {"classes": 1000, "size": 96, "channels": 3},
}
"""Classes, size and channels of each source's images.

Other sources are assumed to have ten classes of 32 x 32 color images.
"""


def stand_in(source: str, samples: int = 16) -> str:
    """Return the name of a fake source with the same classes, image size and channels as `source`."""
    shape = IMAGE_SHAPES.get(source.partition(":")[0], {"classes": 10, "size": 32, "channels": 3})
    return "fake," + ",".join(f"{name}={number}" for name, number in {**shape, "samples": samples}.items())
