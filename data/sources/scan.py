"""Scan of all image files of a tree: sizes from headers, damage from file ends, checksums of a few files.

Only files that seem truncated are decoded. The result is cached, and stays valid until a name, a byte size or
a modification time changes.
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
from coursepack.console import SHORT_SECONDS, progress
from coursepack.data.sources.base import sampled, sha256_of
from coursepack.data.sources.cache import key_of, load_arrays, save_arrays
from coursepack.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from numpy.typing import NDArray

VERSION = "1"
"""Version of the scan; changing it invalidates cached scans."""
MANY = 20_000
"""Number of files from which on progress is meters."""
PIECE = 64
"""Number of files that a thread processes at a time."""
THREADS = 16
TAIL = 256
"""Number of bytes at the end of a file that must contain the end marker."""
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Scan:
    """Result of scanning the files of a source."""

    sizes: NDArray[np.int32]
    """Height and width `(N, 2)` in pixels, 0 for unreadable files."""
    damaged: tuple[tuple[int, str], ...]
    """Samples whose files are damaged, each with a description of the damage."""
    fingerprint: str
    tree_key: str
    """Key of the tree in the cache folder."""
    listing: str
    """Digest of names, byte sizes and modification times."""


@dataclass(frozen=True)
class Listing:
    """Paths and labels of a source's files, before any file is opened."""

    name: str
    root: str
    files: NDArray[np.bytes_]
    """Paths `(N,)` relative to the root, encoded for the file system."""
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def path(self, sample: int) -> str:
        """Return the path of a sample's file."""
        return os.path.join(self.root, os.fsdecode(self.files[sample]))  # noqa: PTH118 - Path costs more than the call, a million times

    def scan(self) -> Scan:
        """Scan all files, or return the cached result of an earlier scan."""
        samples = range(len(self.files))
        stats = np.array(
            in_threads(lambda i: _stat(self.path(i)), samples, f"list {self.name}", delay=SHORT_SECONDS),
            dtype=np.int64,
        )
        names = sha256_of(self.files)
        labels = {"labels": sha256_of(self.labels), "classes": self.class_names}
        listing = fingerprint(
            {"version": VERSION, "name": self.name, "files": names, "stats": sha256_of(stats), **labels}
        )
        tree_key = key_of("scan", self.root, self.name)
        arrays = load_arrays(tree_key)
        if arrays is None or not _is_current(arrays, listing, len(self.files)):
            images = in_threads(lambda i: inspect_image(self.path(i)), samples, f"scan {self.name}")
            arrays = {
                "listing": np.array(listing),
                "sizes": np.array([(height, width) for height, width, _ in images], dtype=np.int32),
                "damaged": np.array([i for i, (_, _, damage) in enumerate(images) if damage], dtype=np.int64),
                "damage": np.array([damage for _, _, damage in images if damage], dtype=np.str_),
                "content": np.array(
                    in_threads(lambda i: _checksum(self.path(i)), sampled(len(self.files)).tolist())
                ),
            }
            save_arrays(tree_key, arrays)
        identity = fingerprint(
            {
                "name": self.name,
                "files": names,
                "bytes": sha256_of(stats[:, 0]),
                "sizes": sha256_of(arrays["sizes"]),
                "content": arrays["content"].tolist(),
                **labels,
            }
        )
        damaged = tuple(zip(arrays["damaged"].tolist(), arrays["damage"].tolist(), strict=True))
        return Scan(arrays["sizes"], damaged, identity, tree_key, listing)


def inspect_image(path: str) -> tuple[int, int, str]:
    """Return height, width and a description of the damage of an image file; no damage is an empty text."""
    from PIL import Image, UnidentifiedImageError

    height = width = 0
    try:
        with open(path, "rb", opener=open_regular) as file:
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
        return 0, 0, "does not exist"
    except Exception as error:  # noqa: BLE001, RUF100 -- Pillow's plugins raise exceptions of any type
        return height, width, f"cannot be decoded: {str(error) or type(error).__name__}"
    return height, width, ""


def in_threads(work: Callable[[T], R], items: Sequence[T], title: str = "", *, delay: float = 0.0) -> list[R]:
    """Apply `work` to every item in threads and return the results in order.

    With a title, progress is shown after `delay` seconds if there are many items.
    """
    pieces = [items[start : start + PIECE] for start in range(0, len(items), PIECE)]
    results: list[R] = []
    is_long = bool(title) and len(items) >= MANY
    meters: Any = progress(title, len(items), "files", delay=delay) if is_long else nullcontext()
    with meters as meter, ThreadPoolExecutor(THREADS) as pool:
        for piece_results in pool.map(lambda piece: [work(item) for item in piece], pieces):
            results += piece_results
            if meter is not None:
                meter.advance(len(piece_results))
    return results


def _stat(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 - Path costs more than the call, a million times
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _checksum(path: str) -> int:
    try:
        with open(path, "rb", opener=open_regular) as file:
            return int(google_crc32c.value(file.read()))
    except OSError:
        return 0


def _is_current(arrays: dict[str, NDArray[Any]], listing: str, count: int) -> bool:
    expected = {"listing", "sizes", "damaged", "damage", "content"}
    return (
        arrays.keys() == expected
        and str(arrays["listing"]) == listing
        and arrays["sizes"].shape == (count, 2)
        and len(arrays["damaged"]) == len(arrays["damage"])
    )
