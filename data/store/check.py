"""Is every byte of a store what its manifest vouches for?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coursepack.data.store.layout import shard_key, table_key
from coursepack.data.store.manifest import load_manifest, zarr_metadata
from coursepack.data.store.sampling import unlike_zarr
from coursepack.data.store.shards import file_checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coursepack.data.store.manifest import Manifest


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store."""

    key: str
    """The file it is wrong with."""
    what: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


@dataclass(frozen=True)
class StoreReport:
    """What `verify` found."""

    files: int
    """Files checked."""
    size: int
    """Their bytes in all, as the manifest gives them."""
    problems: tuple[Problem, ...]
    """Empty for a sound store."""


def verify(path: Path, *, on_file: Callable[[int], None] | None = None) -> StoreReport:
    """Check sizes and checksums of all files, and the Zarr metadata.

    Where all that is sound, also read one random chunk of every array through the `zarr` library.

    Args:
        path: the store.
        on_file: called with a file's number of bytes after each, for progress.

    Raises:
        StoreNotFound, StoreMismatch, StoreDamaged: as `load_manifest`.
    """
    manifest = load_manifest(path)
    problems = [
        *_file_problems(path, manifest, on_file),
        *_unvouched(manifest),
        *_metadata_problems(path, manifest),
    ]
    if not problems:
        problems = [Problem(key, what) for key, what in unlike_zarr(path, manifest)]
    size = sum(size for size, _ in manifest.files.values())
    return StoreReport(len(manifest.files), size, tuple(problems))


def _file_problems(
    path: Path, manifest: Manifest, on_file: Callable[[int], None] | None
) -> Iterator[Problem]:
    arrays = manifest.zarr_arrays()
    for key, (size, crc) in manifest.files.items():
        layout, _ = arrays[key.rpartition("/")[0]]
        file = path / key
        if not file.is_file():
            yield Problem(key, "missing")
        elif file.stat().st_size != size:
            yield Problem(key, f"{file.stat().st_size} bytes, expected {size}")
        elif file_checksum(np.memmap(file, dtype=np.uint8, mode="r"), layout) != crc:
            yield Problem(key, "content does not match its checksum")
        if on_file is not None:
            on_file(size)


def _unvouched(manifest: Manifest) -> Iterator[Problem]:
    """A committed view all of whose shards the manifest does not name would be refused by the reader."""
    keys = [table_key(name, table.layout) for name, table in manifest.tables.items()]
    for name, array in manifest.arrays.items():
        for component, layout in array.components.items():
            for view in manifest.committed.get(name, ()):
                count = layout.shard_count(manifest.samples)
                keys += [shard_key(f"{name}/{component}", view, shard, layout) for shard in range(count)]
    yield from (Problem(key, "not vouched for") for key in keys if key not in manifest.files)


def _metadata_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """A foreign Zarr reader believes zarr.json, so it has to say what the manifest says."""
    for key, metadata in zarr_metadata(manifest).items():
        try:
            found = json.loads((path / key).read_text())
        except (OSError, ValueError, RecursionError):
            yield Problem(key, "missing or not JSON")
            continue
        if found != metadata:
            yield Problem(key, "does not describe what the manifest does")
