"""The interface of a source, and two simple sources: an array in memory, and the first samples of a source.

A sample is an index into a source's split, and that index never changes. A subset of samples belongs to a run
(`splits.subset`), never to a source. Sources are sent to worker processes, so they can be pickled; the pickle
leaves out what can be read again from disk.
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
from coursepack.data.randomness import Purpose, first_shuffled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples

    Pixels = NDArray[np.uint8] | list[NDArray[np.uint8]]
    """Images of one size `(n, H, W, channels)`, or a list of images `(H, W, channels)`."""

SAMPLED = 64
"""Number of samples whose content enters a fingerprint that does not cover all content."""
MAX_IN_MEMORY = 2 << 30
"""Maximum size in bytes of the pixels that a source keeps in memory."""


class Source(Protocol):
    """One split of a data set: images with one label each."""

    @property
    def name(self) -> str:
        """Name that opens the source again, with options and split, such as `cifar100:train-0.1`."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(N,)`, available without decoding any image."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, in the order of the class ids."""

    @property
    def channels(self) -> int:
        """Number of channels of the pixels, 1 or 3."""

    @property
    def in_memory(self) -> NDArray[np.uint8] | None:
        """All images `(N, H, W, channels)` if they have one size and are in memory or mapped, else None."""

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that determines samples and labels; sources of files sample the content."""

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Return the height and width `(n, 2)` of each image in pixels, without decoding it if possible."""

    def pixels(self, samples: Samples) -> Pixels:
        """Return images `(n, H, W, channels)` uint8 if `in_memory` is available, else a list of images.

        Raises:
            SourceError: an image cannot be read; the message names the sample and its file.
        """

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of each sample's raw content: the bytes of its file, or of its pixels."""

    def path(self, sample: int) -> str | None:
        """Return the path of a sample's file, or None if samples have no file of their own."""

    def check(self) -> None:
        """Check for damage that can be detected without decoding all images.

        Raises:
            SourceError: files are damaged; the message names them.
        """


@dataclass(frozen=True)
class Spec:
    """Parsed name of a source: `NAME[,OPTIONS]:SPLIT`."""

    name: str
    """Key in `SOURCES`."""
    options: str
    """Text between name and split, with its separator: `,classes=100` or `:module:factory`."""
    split: str

    def __str__(self) -> str:
        return f"{self.name}{self.options}:{self.split}"


@dataclass(frozen=True)
class InMemory:
    """Source whose pixels are one array in memory."""

    name: str
    images: NDArray[np.uint8]
    """Pixels `(N, H, W, channels)`."""
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Number of channels of the pixels."""
        return int(self.images.shape[3])

    @property
    def in_memory(self) -> NDArray[np.uint8]:
        """All images `(N, H, W, channels)`."""
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
        """Return height and width `(n, 2)`, the same for all images."""
        return same_sizes(self.images, samples)

    def pixels(self, samples: Samples) -> NDArray[np.uint8]:
        """Return the images `(n, H, W, channels)` of the samples."""
        return self.images[samples]

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of each image's pixels."""
        return checksums(self.images[sample] for sample in samples)

    def path(self, sample: int) -> None:
        """Return None: samples have no file of their own."""

    def check(self) -> None:
        """Do nothing: there are no files that could be damaged."""


@dataclass(frozen=True)
class FirstSamples:
    """Source of the first `limit` samples of another source, for trial runs that store nothing."""

    source: Source
    limit: int

    @property
    def name(self) -> str:
        """Name of the other source with `[:limit]` appended."""
        return f"{self.source.name}[:{self.limit}]"

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(limit,)`."""
        return self.source.labels[: self.limit]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the other source."""
        return self.source.class_names

    @property
    def channels(self) -> int:
        """Number of channels of the pixels."""
        return self.source.channels

    @property
    def in_memory(self) -> NDArray[np.uint8] | None:
        """The first of the other source's images, not copied."""
        whole = self.source.in_memory
        return None if whole is None else whole[: self.limit]

    @property
    def fingerprint(self) -> str:
        """Fingerprint that differs from the other source's, so that the two are never confused."""
        return fingerprint({"whole": self.source.fingerprint, "limit": self.limit})

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Return height and width `(n, 2)`."""
        return self.source.sizes(samples)

    def pixels(self, samples: Samples) -> Pixels:
        """Return the images as the other source does."""
        return self.source.pixels(samples)

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of each sample's raw content."""
        return self.source.contents(samples)

    def path(self, sample: int) -> str | None:
        """Return the path that the other source returns."""
        return self.source.path(sample)

    def check(self) -> None:
        """Check all of the other source."""
        self.source.check()


def same_sizes(images: NDArray[np.uint8], samples: Samples) -> NDArray[np.int32]:
    """Return the height and width `(n, 2)` of samples of an array `(N, H, W, channels)`."""
    return np.tile(np.array(images.shape[1:3], dtype=np.int32), (len(samples), 1))


def checksums(pieces: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint32]:
    """Return the crc32c of each piece's bytes."""
    values = (google_crc32c.value(np.ascontiguousarray(piece)) for piece in pieces)
    return np.fromiter(values, dtype=np.uint32)


def sampled(count: int) -> Samples:
    """Return the samples, out of `count`, whose content enters a fingerprint, in ascending order."""
    return np.sort(first_shuffled(np.arange(count), SAMPLED, seed=0, view=0, purpose=Purpose.CONTENT))


def sha256_of(array: NDArray[Any]) -> str:
    """Return the sha256 of an array's bytes; integers are hashed as 64 bits in little-endian order."""
    plain = array.astype("<i8") if array.dtype.kind in "iu" else array
    return hashlib.sha256(plain.tobytes()).hexdigest()


def fields_only(source: Any) -> dict[str, Any]:
    """Return the state of a dataclass to pickle: its fields, without cached properties."""
    return {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
