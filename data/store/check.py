"""Verification of a store's files and metadata against its manifest."""

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

MAX_METADATA_BYTES = 1 << 20
"""Maximum size of a zarr.json file, which normally has less than 2,000 bytes."""


@dataclass(frozen=True)
class Problem:
    """A defect found in a store."""

    key: str
    """Key of the affected file."""
    what: str
    view: int | None = None
    """View whose list is damaged; None if the file is not a list."""

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


@dataclass(frozen=True)
class StoreReport:
    """Result of `verify`."""

    files: int
    """Number of files checked."""
    size: int
    """Total size of these files in bytes, according to the manifest."""
    problems: tuple[Problem, ...]
    """Defects found; empty for an intact store."""


def verify(where: str | Path | Location, *, on_file: Callable[[int], None] | None = None) -> StoreReport:
    """Check sizes and checksums of all files, and the Zarr metadata.

    If all of these are intact, also read one random chunk of every array with the `zarr` library.

    Args:
        where: path, address or location of the store.
        on_file: called after each file with its size in bytes, to report progress.

    Raises:
        StoreNotFound, StoreMismatch, StoreDamaged: as `load_manifest`.
    """
    location = open_location(where)
    manifest = load_manifest(location)
    problems = list(_list_problems(manifest))
    # The files of a view whose list is damaged are unknown.
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
    """Yield a problem for every view whose list cannot be read."""
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
    """Yield every shard of a table or committed view that the manifest omits; the reader refuses these."""
    files = manifest.files
    yield from (Problem(key, "not vouched for") for key in _expected_keys(manifest) if key not in files)


def _expected_keys(manifest: Manifest) -> Iterator[str]:
    """Yield the keys of all tables, then those of all shards view by view."""
    yield from (table_key(name, table.layout) for name, table in manifest.tables.items())
    for view in sorted({view for views in manifest.committed.values() for view in views}):
        for name, array in manifest.arrays.items():
            if view in manifest.committed.get(name, ()):
                for component, layout in array.components.items():
                    for shard in range(layout.shard_count(manifest.samples)):
                        yield shard_key(f"{name}/{component}", view, shard, layout)


def _metadata_problems(location: Location, manifest: Manifest) -> Iterator[Problem]:
    """Yield every zarr.json that disagrees with the manifest; other Zarr readers rely on zarr.json alone."""
    for key, metadata in zarr_metadata(manifest).items():
        try:
            found = parse_json(location.get(key, MAX_METADATA_BYTES))
        except (FileNotFoundError, ValueError):
            yield Problem(key, "missing or not JSON")
        except OSError as error:
            yield Problem(key, _unreadable(error))
        else:
            if found != metadata:
                yield Problem(key, "does not describe what the manifest does")
