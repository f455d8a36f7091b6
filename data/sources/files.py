"""Source whose samples are image files.

Pillow decodes the images and converts them to RGB, as torchvision's ImageFolder does; like there, the
orientation in an EXIF header is not applied. If all images have one size and are small, they are decoded once
and cached.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from coursepack.data.sources.base import MAX_IN_MEMORY, fields_only
from coursepack.data.sources.cache import key_of, load_mapped, save_mapped
from coursepack.data.sources.roots import MAX_NAMES
from coursepack.data.sources.scan import Listing, Scan, in_threads
from coursepack.errors import SourceError
from coursepack.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO, Any

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources.base import Pixels


@dataclass(frozen=True)
class ImageFiles:
    """Image files under one root, with the result of scanning them."""

    listing: Listing
    found: Scan

    @property
    def name(self) -> str:
        """Name and split."""
        return self.listing.name

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(N,)`."""
        return self.listing.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, in the order of the class ids."""
        return self.listing.class_names

    @property
    def channels(self) -> int:
        """Number of channels of the pixels: 3, as images are converted to RGB."""
        return 3

    @property
    def fingerprint(self) -> str:
        """sha256 over names, byte sizes, order, labels, image sizes and the content of 64 files."""
        return self.found.fingerprint

    @functools.cached_property
    def in_memory(self) -> NDArray[np.uint8] | None:
        """All images if they have one size and fit, decoded at most once and then mapped from the cache."""
        # The fingerprint covers the content of a few files only; the listing detects replaced files.
        keys = self.found.tree_key, self.fingerprint, self.found.listing
        return None if self.found.damaged else decoded_once(self.name, self.found.sizes, keys, self._decode)

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Return the height and width `(n, 2)` in the files' headers."""
        return self.found.sizes[samples]

    def pixels(self, samples: Samples) -> Pixels:
        """Return an array if `in_memory` is available, else a list."""
        if self.in_memory is not None:
            return self.in_memory[samples]
        return [self._decode(int(sample)) for sample in samples]

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of each file's bytes."""
        values = in_threads(self._checksum, [int(sample) for sample in samples])
        return np.array(values, dtype=np.uint32)

    def path(self, sample: int) -> str:
        """Return the path of a sample's file."""
        return self.listing.path(sample)

    def check(self) -> None:
        """Raise SourceError if the scan found files that are empty, truncated, too large or not images."""
        damaged = self.found.damaged
        refuse_damaged(self.name, len(self.labels), [(self.path(sample), text) for sample, text in damaged])

    def __getstate__(self) -> dict[str, Any]:
        return fields_only(self)

    def _decode(self, sample: int) -> NDArray[np.uint8]:
        path = self.path(sample)
        try:
            with open(path, "rb", opener=open_regular) as file:
                return decode(file, self.found.sizes[sample])
        except Exception as error:
            raise self._unreadable(sample, str(error) or type(error).__name__) from error

    def _checksum(self, sample: int) -> int:
        try:
            with open(self.path(sample), "rb", opener=open_regular) as file:
                return int(google_crc32c.value(file.read()))
        except OSError as error:
            raise self._unreadable(sample, error.strerror or str(error)) from error

    def _unreadable(self, sample: int, problem: str) -> SourceError:
        return unreadable(self.name, sample, self.path(sample), problem)


def decode(file: IO[bytes], size: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Decode an image file to RGB `(H, W, 3)`.

    Raises:
        ValueError: the image does not have the height and width `size` of the scan.
        Exception: Pillow cannot decode the file.
    """
    from PIL import Image

    with Image.open(file) as image:
        pixels = np.array(image.convert("RGB"))
    if pixels.shape[:2] != tuple(size):
        height, width = size
        raise ValueError(
            f"it has {pixels.shape[0]} x {pixels.shape[1]} pixels, but {height} x {width} when scanned"
        )
    return pixels


def decoded_once(
    name: str,
    sizes: NDArray[np.int32],
    keys: tuple[str, ...],
    decode_sample: Callable[[int], NDArray[np.uint8]],
) -> NDArray[np.uint8] | None:
    """Return all images `(N, H, W, 3)`, mapped from the cache, or None if sizes differ or they are too large.

    Args:
        name: name of the source, for the display of progress.
        sizes: height and width `(N, 2)` of each image.
        keys: key of the tree of files in the cache, and texts that identify its content.
        decode_sample: returns the image `(H, W, 3)` of a sample. It is called in threads.
    """
    from PIL import __version__ as decoder

    shape = (len(sizes), int(sizes[0, 0]), int(sizes[0, 1]), 3)
    if int(np.prod(shape, dtype=np.int64)) > MAX_IN_MEMORY or not bool((sizes == sizes[0]).all()):
        return None
    tree_key, content_key = keys[0], key_of(*keys[1:], decoder)
    kept = load_mapped(tree_key, content_key, shape)
    if kept is not None:
        return kept
    pixels = np.empty(shape, dtype=np.uint8)

    def fill(sample: int) -> None:
        pixels[sample] = decode_sample(sample)

    in_threads(fill, range(len(sizes)), f"decode {name}")
    save_mapped(tree_key, content_key, pixels)
    return pixels


def refuse_damaged(name: str, samples: int, damaged: Sequence[tuple[str, str]]) -> None:
    """Raise SourceError if there are damaged files: pairs of a path and a description of the damage."""
    if not damaged:
        return
    files = [f"  {path} {damage}" for path, damage in damaged[:MAX_NAMES]]
    if len(damaged) > MAX_NAMES:
        files.append(f"  and {len(damaged) - MAX_NAMES:,} more")
    raise SourceError(
        f"source {name!r} has {len(damaged):,} damaged files among {samples:,}:\n"
        + "\n".join(files)
        + "\nReplace them, or remove them; without them the source has a different fingerprint."
    )


def unreadable(name: str, sample: int, path: str, problem: str) -> SourceError:
    """Return an error about the file of one sample."""
    return SourceError(
        f"sample {sample} of source {name!r} cannot be read: {path}: {problem}. Replace the file"
    )


def open_files(
    name: str, root: str, files: list[str], labels: list[int], class_names: tuple[str, ...]
) -> ImageFiles:
    """Return a source of the given files, relative to the root and in the order of their indices."""
    names = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
    listing = Listing(name, root, names, np.array(labels, dtype=np.int64), class_names)
    return ImageFiles(listing, listing.scan())
