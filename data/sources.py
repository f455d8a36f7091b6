"""Sources: where samples come from.

A sample is an index into a source's split, and that index never changes. A subset belongs to a run
(`subset`), never to a source.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from coursepack.canonical import fingerprint
from coursepack.data.randomness import Purpose, shuffled
from coursepack.errors import RecipeError, UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples


class Source(Protocol):
    """One split of a data set: images and single labels."""

    @property
    def name(self) -> str:
        """Name and split, `digits:train`."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(N,)`, without decoding any image."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, in the order of the ids."""

    @property
    def channels(self) -> int:
        """Channels of the pixels, 1 or 3."""

    @property
    def size(self) -> int:
        """Side of the images in pixels."""

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that determines samples and labels."""

    def pixels(self, samples: Samples) -> NDArray[np.uint8]:
        """Images `(n, H, W, channels)` of the given samples."""


@dataclass(frozen=True)
class InMemory:
    """A source whose pixels are one array."""

    name: str
    images: NDArray[np.uint8]
    """`(N, H, W, channels)`."""
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Channels of the pixels."""
        return int(self.images.shape[3])

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return int(self.images.shape[1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over name, classes, labels and all pixels."""
        content = hashlib.sha256(self.labels.astype("<i8").tobytes() + self.images.tobytes()).hexdigest()
        return fingerprint(
            {"name": self.name, "classes": self.class_names, "shape": self.images.shape, "content": content}
        )

    def pixels(self, samples: Samples) -> NDArray[np.uint8]:
        """Images `(n, H, W, channels)` of the given samples."""
        return self.images[samples]


@dataclass(frozen=True)
class FirstSamples:
    """The first few samples of a source: only to try something out, never to be stored for good."""

    whole: Source
    limit: int

    @property
    def name(self) -> str:
        """Tells that it is a part."""
        return f"{self.whole.name}[:{self.limit}]"

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(limit,)`."""
        return self.whole.labels[: self.limit]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.class_names

    @property
    def channels(self) -> int:
        """Channels of the pixels."""
        return self.whole.channels

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.whole.size

    @property
    def fingerprint(self) -> str:
        """Not the whole's, so that nothing takes one for the other."""
        return fingerprint({"whole": self.whole.fingerprint, "limit": self.limit})

    def pixels(self, samples: Samples) -> NDArray[np.uint8]:
        """Images `(n, H, W, channels)`."""
        return self.whole.pixels(samples)


TEST_SHARE = 5
"""One digit in this many is a test sample, class by class."""


def digits(split: str, root: Path | None) -> Source:
    """scikit-learn's 1797 real 8x8 digits (UCI, Alpaydin and Kaynak 1998): 1442 train, 355 test.

    The split is fixed: within each class, a seeded fifth is for testing. Sixteen grey levels become 0..255.
    """
    from sklearn.datasets import load_digits

    if root is not None:
        raise RecipeError("source 'digits' ships with scikit-learn and has no files: leave --root out")
    bunch = load_digits()
    images = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = shuffled(np.flatnonzero(labels == digit), seed=0, view=0, purpose=Purpose.SPLIT)
        test[members[: len(members) // TEST_SHARE]] = True
    chosen = test if split == "test" else ~test
    return InMemory(
        f"digits:{split}", images[chosen], labels[chosen], tuple(str(digit) for digit in range(10))
    )


@dataclass(frozen=True)
class SourceKind:
    """How a named source is opened, and which splits it has."""

    open: Callable[[str, Path | None], Source]
    splits: tuple[str, ...]
    """The first is the default."""
    evaluation_split: str


SOURCES = {
    "digits": SourceKind(digits, splits=("train", "test"), evaluation_split="test"),
}


def open_source(spec: str, root: Path | None = None) -> Source:
    """Open `NAME` or `NAME:SPLIT`.

    Args:
        spec: a name in `SOURCES`, and a split of it (the first by default).
        root: folder of the data set's files, for sources that have files.

    Raises:
        UnknownName: no such source or split.
        SourceError: files missing or damaged.
    """
    name, _, split = spec.partition(":")
    if name not in SOURCES:
        raise UnknownName("source", name, SOURCES)
    kind = SOURCES[name]
    split = split or kind.splits[0]
    if split not in kind.splits:
        raise UnknownName(f"split of source {name!r}", split, kind.splits)
    return kind.open(split, root)


def evaluation_spec(spec: str) -> str:
    """The split that students of `spec` are evaluated on, `digits:test` for `digits:train`."""
    name = spec.partition(":")[0]
    if name not in SOURCES:
        raise UnknownName("source", name, SOURCES)
    return f"{name}:{SOURCES[name].evaluation_split}"


def subset(source: Source, limit: int | None) -> Samples:
    """The samples a run uses: all, or `limit` of them, evenly over classes and the same in every run.

    Raises:
        RecipeError: `limit` is larger than the source, or not positive.
    """
    everything = np.arange(len(source.labels))
    if limit is None:
        return everything
    if not 1 <= limit <= len(everything):
        raise RecipeError(f"limit is {limit}, but source {source.name!r} has {len(everything)} samples")
    order = shuffled(everything, seed=0, view=0, purpose=Purpose.SUBSET)
    labels = source.labels[order]
    # Rank of each sample within its class: taking the lowest ranks first keeps classes even.
    rank = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        members = labels == label
        rank[members] = np.arange(members.sum())
    return np.sort(order[np.argsort(rank, kind="stable")[:limit]])
