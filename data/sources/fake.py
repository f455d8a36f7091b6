"""Images that are drawn: any size, any number of classes, and something in them to learn.

Each class has a smooth random pattern. An image is its class's pattern, moved by a few pixels, with some of
another class's pattern and noise over it. All of it is integer arithmetic on Philox words, so an image is the
same on every platform, and drawn by itself: opening a large source costs nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coursepack.canonical import fingerprint
from coursepack.data.randomness import Purpose, below, random_words
from coursepack.data.sources.base import MOST_IN_MEMORY, checksums, fields_only, sampled
from coursepack.errors import RecipeError, UnknownName

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources.base import Pixels, Source, Spec

DEFAULTS = {"classes": 10, "size": 32, "samples": 10_000, "channels": 3, "seed": 0}
TEST_SHARE = 5
"""The test split has one image for this many of train."""
CELLS = 4
"""Random numbers along each side of a pattern; between them it is interpolated."""
STEPS = 16
"""The other class has 0 to 7 of so many parts."""
_PIECE = 256
_PATTERNS, _NOISE, _CHOICES = 0, 1, 2
"""Views of the generator: each split adds its own to the last two."""


@dataclass(frozen=True)
class Fake:
    """A source of drawn images."""

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
        """Class ids `(N,)`: classes in turn."""
        return np.arange(self.samples, dtype=np.int64) % self.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ids."""
        return tuple(str(label) for label in range(self.classes))

    @functools.cached_property
    def whole(self) -> NDArray[np.uint8] | None:
        """All images, drawn when first asked for, unless they are too many."""
        if self.samples * self.size**2 * self.channels > MOST_IN_MEMORY:
            return None
        return self._draw(np.arange(self.samples))

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over name, numbers and a few images."""
        numbers = {name: getattr(self, name) for name in DEFAULTS}
        content = self.contents(sampled(self.samples)).tolist()
        return fingerprint({"name": self.name, **numbers, "content": content})

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Height and width `(n, 2)`, the same for all."""
        return np.full((len(samples), 2), self.size, dtype=np.int32)

    def pixels(self, samples: Samples) -> Pixels:
        """An array where `whole` is there, else a list."""
        return list(self._draw(np.asarray(samples))) if self.whole is None else self.whole[samples]

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """crc32c `(n,)` of each image's pixels."""
        return checksums(self._draw(np.asarray(samples)))

    def path(self, sample: int) -> None:
        """Samples have no file each."""

    def check(self) -> None:
        """Nothing on disk, nothing to be damaged."""

    def __getstate__(self) -> dict[str, Any]:
        return fields_only(self)

    @functools.cached_property
    def _patterns(self) -> NDArray[np.uint8]:
        """Patterns `(classes, side, side, channels)`, wider than an image by the room to move."""
        side = self.size + self._room
        count = self.classes * CELLS * CELLS * self.channels
        words = random_words(self.seed, np.arange(-(-count // 4)), _PATTERNS, Purpose.FAKE).reshape(-1)
        cells = (words[:count] >> np.uint32(24)).astype(np.uint8)
        grids = cells.reshape(self.classes, CELLS, CELLS, self.channels)
        out = np.empty((self.classes, side, side, self.channels), dtype=np.uint8)
        for start in range(0, self.classes, _PIECE):
            rows = _stretched(grids[start : start + _PIECE], side, 1)
            out[start : start + _PIECE] = _stretched(rows, side, 2)
        return out

    @property
    def _room(self) -> int:
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
        top = below(words[:, 0], self._room + 1)
        left = below(words[:, 1], self._room + 1)
        labels = samples % self.classes
        other = (labels + below(words[:, 2], self.classes)) % self.classes
        share = below(words[:, 3], STEPS // 2).astype(np.uint16)[:, None, None, None]
        # (n, channels, H, W) in 16 bits: the weights of the two add up to STEPS.
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


def _stretched(grids: NDArray[np.uint8], side: int, axis: int) -> NDArray[np.uint8]:
    """Grids `(n, H, W, channels)` interpolated to `side` along one axis, in 16 bits."""
    steps = max(side - 1, 1)
    position = np.arange(side) * (CELLS - 1)
    low = np.minimum(position // steps, CELLS - 2)
    shape = [1, 1, 1, 1]
    shape[axis] = side
    weight = ((position - low * steps) * 256 // steps).astype(np.uint16).reshape(shape)
    total = np.take(grids, low, axis) * (256 - weight)
    total += np.take(grids, low + 1, axis) * weight
    stretched: NDArray[np.uint8] = (total >> 8).astype(np.uint8)
    return stretched


def fake(spec: Spec, root: Path | None) -> Source:
    """Drawn images: `fake,classes=100,size=32,samples=50000,channels=3,seed=0:train`.

    Test images have the classes' same patterns, and are a fifth as many.
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


LOOKS = {
    "digits": {"classes": 10, "size": 8, "channels": 1},
    "cifar10": {"classes": 10, "size": 32, "channels": 3},
    "cifar100": {"classes": 100, "size": 32, "channels": 3},
    "cinic10": {"classes": 10, "size": 32, "channels": 3},
    "tiny-imagenet": {"classes": 200, "size": 64, "channels": 3},
    "imagenet": {"classes": 1000, "size": 96, "channels": 3},
}
"""Classes, size and channels of each source's images; others are taken for ten classes of 32 x 32 color
images."""


def stand_in(source: str, samples: int = 16) -> str:
    """Return the name of a fake source whose images have the classes, size and channels of another's."""
    looks = LOOKS.get(source.partition(":")[0], {"classes": 10, "size": 32, "channels": 3})
    return "fake," + ",".join(f"{name}={number}" for name, number in {**looks, "samples": samples}.items())
