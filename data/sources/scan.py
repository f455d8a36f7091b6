"""One look at every image file of a tree: sizes from headers, damage from tails, checksums of a few.

Nothing is decoded but what looks cut off. What was seen is kept in the cache folder under the tree's place,
and holds as long as the listing does: names, byte sizes and times of change.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import google_crc32c
import numpy as np

from coursepack.canonical import fingerprint
from coursepack.console import progress
from coursepack.data.sources.base import sampled, sha256_of
from coursepack.data.sources.cache import key_of, load_facts, save_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from numpy.typing import NDArray

VERSION = "1"
"""Of what a scan looks for: another one makes old scans worthless."""
LONG = 20_000
"""Files from which on progress is shown."""
PIECE = 64
"""Files that a thread takes at a time."""
THREADS = 16
TAIL = 256
"""Bytes at the end of a file in which its end marker has to be."""
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Scan:
    """What is known about the files of a source."""

    sizes: NDArray[np.int32]
    """Height and width `(N, 2)` in pixels, 0 where they cannot be read."""
    damaged: tuple[tuple[int, str], ...]
    """Samples whose files are damaged, and how."""
    fingerprint: str
    place: str
    """Of the tree, for the cache folder."""
    listing: str
    """Digest of names, byte sizes and times of change."""


@dataclass(frozen=True)
class Listing:
    """The files of a source, before any is opened."""

    name: str
    root: str
    files: NDArray[np.bytes_]
    """Paths `(N,)` relative to the root, as bytes of the file system."""
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def path(self, sample: int) -> str:
        """A file's path."""
        return os.path.join(self.root, os.fsdecode(self.files[sample]))  # noqa: PTH118 - Path costs more than the call, a million times

    def scan(self) -> Scan:
        """Look at all files, or remember what was seen before."""
        samples = range(len(self.files))
        stats = np.array(in_threads(lambda i: _stat(self.path(i)), samples), dtype=np.int64)
        names = sha256_of(self.files)
        labels = {"labels": sha256_of(self.labels), "classes": self.class_names}
        listing = fingerprint(
            {"version": VERSION, "name": self.name, "files": names, "stats": sha256_of(stats), **labels}
        )
        place = key_of("scan", self.root, self.name)
        facts = load_facts(place)
        if facts is None or not _fits(facts, listing, len(self.files)):
            seen = in_threads(lambda i: look(self.path(i)), samples, f"scan {self.name}")
            facts = {
                "listing": np.array(listing),
                "sizes": np.array([(height, width) for height, width, _ in seen], dtype=np.int32),
                "damaged": np.array([i for i, (_, _, damage) in enumerate(seen) if damage], dtype=np.int64),
                "damage": np.array([damage for _, _, damage in seen if damage], dtype=np.str_),
                "content": np.array(
                    in_threads(lambda i: _checksum(self.path(i)), sampled(len(self.files)).tolist())
                ),
            }
            save_facts(place, facts)
        identity = fingerprint(
            {
                "name": self.name,
                "files": names,
                "bytes": sha256_of(stats[:, 0]),
                "sizes": sha256_of(facts["sizes"]),
                "content": facts["content"].tolist(),
                **labels,
            }
        )
        damaged = tuple(zip(facts["damaged"].tolist(), facts["damage"].tolist(), strict=True))
        return Scan(facts["sizes"], damaged, identity, place, listing)


def look(path: str) -> tuple[int, int, str]:
    """Height, width and damage of an image file; an empty text is no damage."""
    from PIL import Image, UnidentifiedImageError

    height = width = 0
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - Path costs more than the call, a million times
            length = file.seek(0, os.SEEK_END)
            if length == 0:
                return 0, 0, "is empty (0 bytes)"
            file.seek(0)
            with Image.open(file) as image:
                width, height = image.size
                marker = END_MARKERS.get(image.format or "", b"")
            file.seek(max(0, length - TAIL))
            if marker not in file.read():
                file.seek(0)
                with Image.open(file) as image:
                    image.load()
    except UnidentifiedImageError:
        return 0, 0, "has no header of an image format that Pillow reads"
    except FileNotFoundError:
        return 0, 0, "is not there"
    except Exception as error:  # noqa: BLE001, RUF100 -- Pillow's plugins raise whatever they meet
        return height, width, f"cannot be decoded: {str(error) or type(error).__name__}"
    return height, width, ""


def in_threads(work: Callable[[T], R], items: Sequence[T], title: str = "") -> list[R]:
    """The results of `work` on every item, in their order; with a title, progress where there are many."""
    pieces = [items[start : start + PIECE] for start in range(0, len(items), PIECE)]
    results: list[R] = []
    shown: Any = progress(title, len(items), "files") if title and len(items) >= LONG else nullcontext()
    with shown as meter, ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(lambda piece: [work(item) for item in piece], pieces):
            results += part
            if meter is not None:
                meter.advance(len(part))
    return results


def _stat(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 - Path costs more than the call, a million times
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _checksum(path: str) -> int:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - Path costs more than the call, a million times
            return int(google_crc32c.value(file.read()))
    except OSError:
        return 0


def _fits(facts: dict[str, NDArray[Any]], listing: str, count: int) -> bool:
    expected = {"listing", "sizes", "damaged", "damage", "content"}
    return (
        facts.keys() == expected
        and str(facts["listing"]) == listing
        and facts["sizes"].shape == (count, 2)
        and len(facts["damaged"]) == len(facts["damage"])
    )
