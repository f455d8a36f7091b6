"""Local cache of the shards of stores in buckets, in `shards` in the cache folder.

Whole shards are downloaded, compared with the size and the checksum in the manifest, and written as files.
The name of a file is the key of the shard followed by its size and checksum, so shards of a rewritten store
are other files. All processes of a machine share the folder, and one at a time downloads. Only files of the
cache are ever removed; those that were used least recently come first.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from coursepack.console import SHORT_SECONDS, byte_size, progress
from coursepack.data.sources.cache import VARIABLE, cache_folder
from coursepack.data.store.locations.local import LocalLocation
from coursepack.data.store.mapping import ShardFile
from coursepack.data.store.shards import file_checksum, rows_size
from coursepack.errors import RecipeError, StoreFull
from coursepack.files import PARTIAL, write_whole
from coursepack.threads import map_in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coursepack.data.store.layout import ArrayLayout
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest
    from coursepack.data.store.mapping import Shards

FOLDER = "shards"
SUFFIX = ".shard"
LIMIT_VARIABLE = "COURSEPACK_CACHE_BYTES"
"""Environment variable with the maximum size of the cache, as `parse_bytes` reads it."""
IN_FLIGHT = 4
"""Number of shards that are downloaded at the same time."""
FEWEST_VIEWS = 2
"""Number of views of all stores that the cache has to hold: the current one and the next."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class ShardCache:
    """Cached shards of one store. Safe to pickle and to use in several threads."""

    def __init__(self, remote: Location, folder: Path, max_bytes: int, views: int = FEWEST_VIEWS) -> None:
        """Open the cache of a store.

        Args:
            remote: location of the store.
            folder: folder of the cache, shared by all stores.
            max_bytes: maximum size of all files of the cache.
            views: number of views of the store that may be open at the same time.
        """
        self.views, self._name = views, remote.name
        self._folder, self._max_bytes = folder, max_bytes
        self._local = LocalLocation(folder / hashlib.sha256(str(remote).encode()).hexdigest()[:16])

    def fetch(self, shards: Shards) -> Shards:
        """Return the cached files of a view's shards, after downloading those that are missing.

        Raises:
            StoreDamaged: a shard in the bucket is missing or does not match its checksum.
            StoreFull: the disk of the cache is full.
            OSError: the bucket cannot be read.
        """
        cached = {
            name: (layout, [self._cached(shard) for shard in files])
            for name, (layout, files) in shards.items()
        }
        with LocalLocation(self._folder).lock():
            missing = []
            for layout, shard in _each(shards):
                path = self._path(shard)
                if path.is_file() and path.stat().st_size == shard.size:
                    os.utime(path)
                else:
                    missing.append((layout, shard))
            needed = sum(shard.size for _, shard in missing)
            self._make_room(needed)
            with progress(f"copy from {self._name}", needed, "bytes", delay=SHORT_SECONDS) as meter:
                for size in map_in_threads(IN_FLIGHT, self._download, missing):
                    meter.advance(size)
        return cached

    def discard_damaged(self, shards: Shards) -> bool:
        """Remove cached files of a view's shards that do not match their checksums.

        Returns:
            True if there were any, or if a file was missing because another process removed it.
        """
        damaged = False
        with LocalLocation(self._folder).lock():
            for layout, shard in _each(shards):
                key = self._cached(shard).key
                try:
                    content = self._local.map(key, resident=True).content
                except FileNotFoundError:
                    damaged = True
                    continue
                if len(content) != shard.size or file_checksum(content, layout) != shard.crc:
                    damaged = True
                    self._local.delete(key)
        return damaged

    def _cached(self, shard: ShardFile) -> ShardFile:
        """Return the cached file of a shard in the bucket."""
        key = f"{shard.key}.{shard.size}.{shard.crc:08x}{SUFFIX}"
        return ShardFile(self._local, key, shard.size, shard.crc)

    def _path(self, shard: ShardFile) -> Path:
        return self._local.root / self._cached(shard).key

    def _download(self, missing: tuple[ArrayLayout, ShardFile]) -> int:
        """Download a shard, and return its size in bytes."""
        layout, shard = missing
        path, content = self._path(shard), shard.read(layout)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(path, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreFull(
                f"the disk of the cache {str(self._folder)!r} is full: set {VARIABLE} to a folder on another "
                "disk, or give a smaller --cache-bytes"
            ) from error
        return shard.size

    def _make_room(self, needed: int) -> None:
        """Remove the files that were used least recently, until `needed` bytes more fit."""
        if not needed:
            return
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in _files(self._folder))
        total = needed + sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def open_caches(
    stores: Sequence[tuple[Location, Manifest]], arrays: Sequence[Sequence[str]]
) -> list[ShardCache | None]:
    """Return the cache of each store in a bucket, and None for the others.

    Args:
        stores: locations and manifests of the stores.
        arrays: names of the arrays that are read from each store.

    Raises:
        StoreFull: the cache cannot hold two views of all of these stores.
        RecipeError: `$COURSEPACK_CACHE_BYTES` is not a size.
    """
    if not any(location.is_remote for location, _ in stores):
        return [None] * len(stores)
    folder = cache_folder() / FOLDER
    most = _limit(folder)
    view_bytes = sum(
        rows_size(manifest.samples, layout)
        for (location, manifest), names in zip(stores, arrays, strict=True)
        for name in names
        for layout in manifest.arrays[name].components.values()
        if location.is_remote
    )
    if FEWEST_VIEWS * view_bytes > most:
        raise StoreFull(
            f"the cache {str(folder)!r} may hold {byte_size(most)}, but two views of the stores in "
            f"buckets take {byte_size(FEWEST_VIEWS * view_bytes)}. "
            f"Give a larger --cache-bytes, or set {VARIABLE} to a folder on a larger disk"
        )
    views = most // max(1, view_bytes)
    return [
        ShardCache(location, folder, most, views) if location.is_remote else None for location, _ in stores
    ]


def parse_bytes(text: str, where: str) -> int:
    """Return a number of bytes from a text such as `200G`, in units of 1000.

    Raises:
        RecipeError: the text is not a size; the message names `where` it comes from.
    """
    match = re.fullmatch(r"([0-9]{1,18})([KMGT]?)", text)
    if match is None:
        raise RecipeError(f"{where} is {text!r}, expected a number of bytes, such as 5000000 or 200G")
    return int(match[1]) * UNITS[match[2]]


def _limit(folder: Path) -> int:
    """Return the maximum size of the cache; by default its current size and half of the free disk."""
    if given := os.environ.get(LIMIT_VARIABLE):
        return parse_bytes(given, f"${LIMIT_VARIABLE}")
    return sum(path.stat().st_size for path in _files(folder)) + LocalLocation(folder).free_bytes() // 2


def _files(folder: Path) -> Iterator[Path]:
    """Yield the shards in the folder of the cache, and what interrupted downloads left."""
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith(SUFFIX) or (SUFFIX in name and name.endswith(PARTIAL)):
                yield Path(root, name)


def _each(shards: Shards) -> Iterator[tuple[ArrayLayout, ShardFile]]:
    """Yield the layout and the file of every shard of a view."""
    return ((layout, shard) for layout, files in shards.values() for shard in files)
