"""Is every byte of a store what its manifest vouches for?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coursepack.data.store.contents import list_key
from coursepack.data.store.layout import shard_key, table_key
from coursepack.data.store.locations import open_location
from coursepack.data.store.opening import load_manifest
from coursepack.data.store.sampling import unlike_zarr
from coursepack.data.store.shards import file_checksum
from coursepack.data.store.zarr_metadata import zarr_metadata
from coursepack.errors import StoreDamaged
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coursepack.data.store.layout import ArrayLayout
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest

MOST_METADATA_BYTES = 1 << 20
"""Of a zarr.json, which has less than 2,000."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store."""

    key: str
    """The file it is wrong with."""
    what: str
    view: int | None = None
    """The view whose list it is wrong with, of a list."""

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


def verify(where: str | Path | Location, *, on_file: Callable[[int], None] | None = None) -> StoreReport:
    """Check sizes and checksums of all files, and the Zarr metadata.

    Where all that is sound, also read one random chunk of every array through the `zarr` library.

    Args:
        where: the store.
        on_file: called with a file's number of bytes after each, for progress.

    Raises:
        StoreNotFound, StoreMismatch, StoreDamaged: as `load_manifest`.
    """
    location = open_location(where)
    manifest = load_manifest(location)
    problems = list(_list_problems(manifest))
    # What a damaged list names is not known.
    manifest = manifest.only_views({*manifest.entries} - {problem.view for problem in problems})
    problems += [
        *_file_problems(location, manifest, on_file),
        *_unvouched(manifest),
        *_metadata_problems(location, manifest),
    ]
    if not problems:
        problems = [Problem(key, what) for key, what in unlike_zarr(location, manifest)]
    size = sum(size for size, _ in manifest.files.values())
    return StoreReport(len(manifest.files), size, tuple(problems))


def _list_problems(manifest: Manifest) -> Iterator[Problem]:
    """Lists of views that cannot be read."""
    for view in manifest.entries:
        try:
            manifest.entries[view]
        except StoreDamaged as error:
            key = list_key(view, manifest.list_digests[view])
            yield Problem(key, f"list of view {view}: {error.__cause__ or error}"[:200], view)


def _file_problems(
    location: Location, manifest: Manifest, on_file: Callable[[int], None] | None
) -> Iterator[Problem]:
    arrays = manifest.zarr_arrays()
    for key, (size, crc) in manifest.files.items():
        layout, _ = arrays[key.rpartition("/")[0]]
        problem = _file_problem(location, key, size, crc, layout)
        if problem is not None:
            yield Problem(key, problem)
        if on_file is not None:
            on_file(size)


def _file_problem(location: Location, key: str, size: int, crc: int, layout: ArrayLayout) -> str | None:
    try:
        found = location.size(key)
        if found != size:
            return f"{found} bytes, expected {size}"
        if file_checksum(location.map(key).content, layout) != crc:
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


def _metadata_problems(location: Location, manifest: Manifest) -> Iterator[Problem]:
    """A foreign Zarr reader believes zarr.json, so it has to say what the manifest says."""
    for key, metadata in zarr_metadata(manifest).items():
        try:
            found = parse_json(location.get(key, MOST_METADATA_BYTES))
        except (FileNotFoundError, ValueError):
            yield Problem(key, "missing or not JSON")
        except OSError as error:
            yield Problem(key, _unreadable(error))
        else:
            if found != metadata:
                yield Problem(key, "does not describe what the manifest does")
