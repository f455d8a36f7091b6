"""Is every byte of a store what its manifest vouches for?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coursepack.data.store.layout import shard_key, table_key
from coursepack.data.store.manifest import load_manifest, zarr_metadata
from coursepack.data.store.sampling import unlike_zarr
from coursepack.data.store.shards import file_checksum
from coursepack.errors import StoreDamaged
from coursepack.files import open_regular
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from coursepack.data.store.layout import ArrayLayout
    from coursepack.data.store.manifest import Manifest

MOST_METADATA_BYTES = 1 << 20
"""Of a zarr.json, which has less than 2,000."""


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


def make_way(path: Path, keys: Iterable[str]) -> None:
    """Remove what a file cannot replace where the files of the keys belong: empty folders, nothing else.

    Raises:
        StoreDamaged: something is in the way that may be worth keeping; nothing was removed.
    """
    folders = [path / key for key in keys if (path / key).is_dir() and not (path / key).is_symlink()]
    parents = {
        path.joinpath(*key.split("/")[:depth]) for key in keys for depth in range(1, key.count("/") + 1)
    }
    full = [f"{str(folder)!r} is a folder that holds something, expected a file" for folder in folders
            if any(folder.iterdir())]  # fmt: skip
    other = [f"{str(parent)!r} is not a folder" for parent in sorted(parents)
             if os.path.lexists(parent) and not parent.is_dir()]  # fmt: skip
    if full or other:
        raise StoreDamaged(f"{'; '.join(full + other)}: move that away and run the same command again")
    for folder in folders:
        folder.rmdir()


def _file_problems(
    path: Path, manifest: Manifest, on_file: Callable[[int], None] | None
) -> Iterator[Problem]:
    arrays = manifest.zarr_arrays()
    for key, (size, crc) in manifest.files.items():
        layout, _ = arrays[key.rpartition("/")[0]]
        problem = _file_problem(path / key, size, crc, layout)
        if problem is not None:
            yield Problem(key, problem)
        if on_file is not None:
            on_file(size)


def _file_problem(file: Path, size: int, crc: int, layout: ArrayLayout) -> str | None:
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            found = os.fstat(opened.fileno()).st_size
            if found != size:
                return f"{found} bytes, expected {size}"
            if file_checksum(np.memmap(opened, dtype=np.uint8, mode="r"), layout) != crc:
                return "content does not match its checksum"
    except OSError as error:
        return _unreadable(error)
    return None


def _unreadable(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return f"cannot be read: {error.strerror or error}"


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
            with os.fdopen(open_regular(path / key), "rb") as file:
                found = parse_json(file.read(MOST_METADATA_BYTES))
        except (FileNotFoundError, ValueError):
            yield Problem(key, "missing or not JSON")
        except OSError as error:
            yield Problem(key, _unreadable(error))
        else:
            if found != metadata:
                yield Problem(key, "does not describe what the manifest does")
