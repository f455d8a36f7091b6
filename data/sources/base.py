"""What a source is, and the two plainest: an array of images, and the first samples of another source.

A sample is an index into a source's split, and that index never changes. A subset belongs to a run
(`splits.subset`), never to a source. Sources travel to worker processes, so they pickle, and what can be read
again from disk is not in the pickle.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import google_crc32c
import numpy as np

from coursepack.canonical import fingerprint
from coursepack.data.randomness import Purpose, shuffled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples

    Pixels = NDArray[np.uint8] | list[NDArray[np.uint8]]
    """Images of one size `(n, H, W, channels)`, or a list of `(H, W, channels)`."""

SAMPLED = 64
"""A fingerprint that cannot afford all content takes the checksums of so many samples."""
MOST_IN_MEMORY = 2 << 30
"""Bytes of pixels that a source that was not asked for more keeps in memory."""


class Source(Protocol):
    """One split of a data set: images and single labels."""

    @property
    def name(self) -> str:
        """What opens it again: name, options and split, `cifar100:train-0.1`."""

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
    def whole(self) -> NDArray[np.uint8] | None:
        """All images `(N, H, W, channels)` where they have one size and are in memory or mapped."""

    @property
    def fingerprint(self) -> str:
        """sha256 over what determines samples and labels; sources of files sample the content."""

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Height and width `(n, 2)` of each image in pixels, without decoding."""

    def pixels(self, samples: Samples) -> Pixels:
        """Images `(n, H, W, channels)` uint8 where `whole` is there, else a list of decoded images.

        Raises:
            SourceError: an image cannot be read; names the sample and its file.
        """

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """crc32c `(n,)` of what each sample's pixels come from: the file's bytes, or those of its pixels."""

    def path(self, sample: int) -> str | None:
        """The file of a sample, where each has its own."""

    def check(self) -> None:
        """Look for damage that can be seen without decoding everything.

        Raises:
            SourceError: names the damaged files.
        """


@dataclass(frozen=True)
class Spec:
    """How a source is asked for: `NAME[,OPTIONS]:SPLIT`."""

    name: str
    """One in `SOURCES`."""
    options: str
    """What stands between name and split with its separator, `,classes=100` or `:module:factory`."""
    split: str

    def __str__(self) -> str:
        return f"{self.name}{self.options}:{self.split}"


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
    def whole(self) -> NDArray[np.uint8]:
        """The images."""
        return self.images

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over name, classes, labels and all pixels."""
        content = hashlib.sha256(self.labels.astype("<i8").tobytes())
        content.update(np.ascontiguousarray(self.images).data)
        return fingerprint(
            {
                "name": self.name,
                "classes": self.class_names,
                "shape": self.images.shape,
                "content": content.hexdigest(),
            }
        )

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Height and width `(n, 2)`, the same for all."""
        return same_sizes(self.images, samples)

    def pixels(self, samples: Samples) -> NDArray[np.uint8]:
        """Images `(n, H, W, channels)` of the given samples."""
        return self.images[samples]

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """crc32c `(n,)` of each image's pixels."""
        return checksums(self.images[sample] for sample in samples)

    def path(self, sample: int) -> None:
        """Samples have no file each."""

    def check(self) -> None:
        """Nothing on disk, nothing to be damaged."""


@dataclass(frozen=True)
class FirstSamples:
    """The first few samples of a source: only to try something out, never to be stored for good."""

    source: Source
    limit: int

    @property
    def name(self) -> str:
        """Tells that it is a part."""
        return f"{self.source.name}[:{self.limit}]"

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(limit,)`."""
        return self.source.labels[: self.limit]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the whole source."""
        return self.source.class_names

    @property
    def channels(self) -> int:
        """Channels of the pixels."""
        return self.source.channels

    @property
    def whole(self) -> NDArray[np.uint8] | None:
        """The first of the whole source's images, not copied."""
        whole = self.source.whole
        return None if whole is None else whole[: self.limit]

    @property
    def fingerprint(self) -> str:
        """Not the whole source's, so that nothing takes one for the other."""
        return fingerprint({"whole": self.source.fingerprint, "limit": self.limit})

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Height and width `(n, 2)`."""
        return self.source.sizes(samples)

    def pixels(self, samples: Samples) -> Pixels:
        """As the whole source gives them."""
        return self.source.pixels(samples)

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """crc32c `(n,)`."""
        return self.source.contents(samples)

    def path(self, sample: int) -> str | None:
        """As in the whole source."""
        return self.source.path(sample)

    def check(self) -> None:
        """Check the whole source."""
        self.source.check()


def same_sizes(images: NDArray[np.uint8], samples: Samples) -> NDArray[np.int32]:
    """Height and width `(n, 2)` of samples of an array `(N, H, W, channels)`."""
    return np.tile(np.array(images.shape[1:3], dtype=np.int32), (len(samples), 1))


def checksums(pieces: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint32]:
    """crc32c of the bytes of each piece."""
    values = (google_crc32c.value(np.ascontiguousarray(piece)) for piece in pieces)
    return np.fromiter(values, dtype=np.uint32)


def sampled(count: int) -> Samples:
    """The samples among `count` whose content a fingerprint takes, ascending."""
    order = shuffled(np.arange(count), seed=0, view=0, purpose=Purpose.CONTENT)
    return np.sort(order[:SAMPLED])


def sha256_of(array: NDArray[Any]) -> str:
    """sha256 of an array's bytes, integers as 64 bits in little-endian order."""
    plain = array.astype("<i8") if array.dtype.kind in "iu" else array
    return hashlib.sha256(plain.tobytes()).hexdigest()


def fields_only(source: Any) -> dict[str, Any]:
    """The state to pickle of a dataclass: its fields, without what was derived from them and kept."""
    return {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
