"""Copying of a store, or a part of it, from one location to another.

Every file is read, compared with its size and checksum in the manifest, and written as a whole; the manifest
is written last. Until then, the object `copy.json` marks the copy as unfinished. It has the digest of each
view's list, so that a copy that goes on can tell which of the files it finds were copied under that list.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from coursepack.canonical import canonical_json
from coursepack.config import Config, parse_config
from coursepack.console import byte_size, progress
from coursepack.data.store.contents import LISTS, Entries, digest_of, list_key, view_of
from coursepack.data.store.done import done_key, done_objects
from coursepack.data.store.locations import absolute_address, open_location
from coursepack.data.store.manifest import MANIFEST
from coursepack.data.store.mapping import ShardFile
from coursepack.data.store.opening import COPY_MARK, check_not_foreign, has_object, load_manifest, load_tagged
from coursepack.data.store.owners import Part, owning
from coursepack.data.store.parts import check_fits, entry_of, part_of, views_of, with_part
from coursepack.data.store.versions import ListReader
from coursepack.data.store.zarr_metadata import zarr_keys, zarr_metadata
from coursepack.errors import RecipeError, StoreBusy, StoreDamaged, StoreFull, StoreMismatch
from coursepack.parsing import MAX_JSON_BYTES, parse_json
from coursepack.threads import map_in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from coursepack.data.store.contents import FileEntry
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest

IN_FLIGHT = 4
"""Number of files that are read and written at the same time; each is in memory as a whole."""
TABLES = "tables"
"""Member of the mark for the files that belong to no view."""


class Copied(NamedTuple):
    """Result of `copy_store`."""

    manifest: Manifest
    """Manifest of the target."""
    files: int
    """Number of data files that this call copied."""
    size: int
    """Total size of these files in bytes."""


class _Mark(Config):
    """Schema of the object `copy.json`."""

    source: str
    fingerprint: str
    lists: dict[str, str]
    """Digest of the list that a view's files are copied by, by view; and that of the tables."""


@dataclass(frozen=True)
class _Work:
    """Work of a copy: its two ends, and the manifests that say what is copied."""

    origin: Location
    target: Location
    stored: Manifest
    """Manifest of the source."""
    part: Manifest
    """The part of it to copy, with the entries of the whole source."""
    before: Manifest | None
    """Manifest of the target, if it has one."""
    tag: str | None
    """Tag of that manifest."""
    result: Manifest
    """Manifest of the target after the copy."""

    def files(self) -> Iterator[tuple[str, FileEntry]]:
        """Yield key, size and checksum of every file that the target's manifest does not have yet."""
        held = self.before
        for key, file in self.part.table_files.items():
            if held is None or key not in held.table_files:
                yield key, file
        for view in views_of(self.part):
            known = held.entries[view].files if held is not None and view in held.entries else {}
            for key, file in entry_of(self.part, view).files.items():
                if key not in known:
                    yield key, file


def copy_store(
    source: str | Path | Location,
    target: str | Path | Location,
    *,
    views: Sequence[range] | None = None,
    arrays: Sequence[str] | None = None,
    single_writer: bool = False,
    quiet: bool = False,
) -> Copied:
    """Copy a store, or a part of it, into a new store or into a copy that lacks views or arrays.

    A copy that was interrupted goes on where it stopped.

    Args:
        source: path, address or location of the store.
        target: path, address or location of the copy.
        views: views to copy; defaults to all that are committed.
        arrays: names of the arrays to copy; defaults to all.
        single_writer: no other process writes to the target; required where it cannot detect that.
        quiet: show no progress.

    Raises:
        StoreNotFound, StoreDamaged: the source cannot be read; finished files of the copy are kept.
        StoreIncomplete: the source has not committed a view that is asked for.
        UnknownName: the source has no such array.
        RecipeError: a view is out of range, or source and target are the same place.
        StoreMismatch: the target is another store, or an unfinished copy of another one.
        StoreBusy: another process is writing to the target.
        StoreFull: the copy does not fit into the free space.
    """
    origin, goal = open_location(source), open_location(target)
    _check_apart(origin, goal)
    stored = load_manifest(origin)
    part = part_of(stored, views, arrays, str(origin))
    work = _work(origin, goal, stored, part)
    _check_space(goal, sum(size for _, (size, _) in _missing(work, _trusted(work))))
    goal.begin_writing(single_writer=single_writer)
    with owning(goal, Part()):
        if goal.tag(MANIFEST) != work.tag:
            work = _work(origin, goal, stored, part)
        return _copy(work, quiet=quiet)


def _check_apart(origin: Location, goal: Location) -> None:
    one, other = absolute_address(str(origin)), absolute_address(str(goal))
    if one == other:
        raise RecipeError(f"{str(origin)!r} and {str(goal)!r} are the same place: give another target")
    for inner, outer in ((one, other), (other, one)):
        if inner.startswith(f"{outer}/"):
            raise RecipeError(f"{inner!r} lies in {outer!r}: give a target beside the store")


def _work(origin: Location, goal: Location, stored: Manifest, part: Manifest) -> _Work:
    """Compare a part of a store with what there is at the target.

    Raises:
        StoreMismatch: the target is another store.
    """
    if not has_object(goal, MANIFEST):
        check_not_foreign(goal, "target")
        empty = {} if part.format_version == 1 else Entries({}, ListReader(part, None))
        start = replace(part, committed={}, entries=empty, environments=(), totals={})
        return _Work(origin, goal, stored, part, None, None, with_part(start, part))
    before, tag = load_tagged(goal)
    check_fits(part, before, str(origin), str(goal))
    start = replace(
        before,
        arrays={**part.arrays, **before.arrays},
        tables={**part.tables, **before.tables},
        table_files={**part.table_files, **before.table_files},
        views=max(part.views, before.views),
    )
    return _Work(origin, goal, stored, part, before, tag, with_part(start, part))


def _digests(work: _Work) -> dict[str, str]:
    """Return the digest of every list of the source that files are copied by, and that of the tables."""
    part = work.part
    lists = {
        str(view): part.list_digests.get(view) or digest_of(part.entries[view].to_bytes())
        for view in views_of(part)
    }
    return {**lists, TABLES: digest_of(canonical_json(sorted(part.table_files.items())).encode())}


def _read_mark(work: _Work) -> dict[str, str]:
    """Return the digests in the mark of the target, empty if there is none.

    Raises:
        StoreMismatch: the target is an unfinished copy of another store.
        StoreDamaged: the mark cannot be read.
    """
    where = work.target.where(COPY_MARK)
    try:
        mark = parse_config(_Mark, parse_json(work.target.get(COPY_MARK, MAX_JSON_BYTES)), where)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StoreDamaged(f"{where!r} cannot be read: {error}. Remove it and run the copy again") from error
    if mark.fingerprint != work.part.fingerprint:
        raise StoreMismatch(
            f"{str(work.target)!r} is an unfinished copy of another store, {mark.source!r}: finish that one, "
            "or give another target"
        )
    return mark.lists


def _trusted(work: _Work) -> frozenset[str]:
    """Return the keys of the files that an interrupted copy wrote from the same lists."""
    marked, wanted = _read_mark(work), _digests(work)
    if not marked:
        return frozenset()
    found = _present(work)
    same = {name for name, digest in wanted.items() if marked.get(name) == digest}
    return frozenset(key for key, _ in work.files() if key in found and _list_of(work, key) in same)


def _list_of(work: _Work, key: str) -> str:
    """Return the member of the mark that a file belongs to."""
    return TABLES if key in work.part.table_files else str(view_of(key))


def _present(work: _Work) -> frozenset[str]:
    """Return the keys of the files at the target, in all folders of the source."""
    folders = work.stored.zarr_arrays()
    return frozenset(f"{folder}/{name}" for folder in folders for name in work.target.names(folder))


def _missing(work: _Work, trusted: frozenset[str]) -> Iterator[tuple[str, FileEntry]]:
    return ((key, file) for key, file in work.files() if key not in trusted)


def _check_space(goal: Location, needed: int) -> None:
    if needed > goal.free_bytes():
        raise StoreFull(
            f"the copy {str(goal)!r} needs {byte_size(needed)} more, but {byte_size(goal.free_bytes())} are "
            "free there: give fewer --view-indices or --arrays, or use another disk"
        )


def _copy(work: _Work, *, quiet: bool) -> Copied:
    target, trusted = work.target, _trusted(work)
    in_all = sum(size for _, (size, _) in work.files())
    left = sum(size for _, (size, _) in _missing(work, trusted))
    files = 0
    if work.result != work.before:
        _begin(work, trusted)
        with progress(f"copy {target.name}", in_all, "bytes", done=in_all - left, shown=not quiet) as meter:
            for size in _copy_files(work, trusted):
                meter.advance(size)
                files += 1
        _commit(work)
    target.delete(COPY_MARK)
    return Copied(load_manifest(target), files, left)


def _begin(work: _Work, trusted: frozenset[str]) -> None:
    """Remove what would be mistaken for copied files, then mark the copy as unfinished."""
    target, views = work.target, set(views_of(work.part))
    for folder in {key.rpartition("/")[0] for key in zarr_keys(work.result)} | {LISTS}:
        target.sweep(folder, lambda _: True)
    for view, index in done_objects(target):
        if view in views:
            target.delete(done_key(view, index))
    found = _present(work)
    for key, _ in _missing(work, trusted):
        if key in found:
            target.delete(key)
    if work.before is None:
        _remove_others(work, found)
    mark = {
        "source": str(work.origin),
        "fingerprint": work.part.fingerprint,
        "lists": {**_read_mark(work), **_digests(work)},
    }
    target.put(COPY_MARK, canonical_json(mark, indent=1).encode())


def _remove_others(work: _Work, found: frozenset[str]) -> None:
    """Remove what an interrupted copy of other views or arrays has left."""
    wanted, folders = _digests(work), work.part.zarr_arrays()
    for key in found:
        folder, _, name = key.rpartition("/")
        if name.startswith("c.") and (folder not in folders or _list_of(work, key) not in wanted):
            work.target.delete(key)
    for key in set(zarr_keys(work.stored)) - set(zarr_keys(work.result)):
        work.target.delete(key)


def _copy_files(work: _Work, trusted: frozenset[str]) -> Iterator[int]:
    """Copy the files that are missing, and yield the size of each."""
    layouts = work.part.zarr_arrays()

    def copy_file(missing: tuple[str, FileEntry]) -> int:
        key, (size, crc) = missing
        layout, _ = layouts[key.rpartition("/")[0]]
        content = ShardFile(work.origin, key, size, crc).read(layout)
        try:
            work.target.put(key, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreFull(
                f"the disk of the copy {str(work.target)!r} is full. What is copied is kept: make room and "
                "run the same command again"
            ) from error
        return size

    return map_in_threads(IN_FLIGHT, copy_file, _missing(work, trusted))


def _commit(work: _Work) -> None:
    """Write the metadata and the lists, then the manifest, and remove the lists that it does not name."""
    target, result = work.target, work.result
    for key, values in zarr_metadata(result).items():
        target.put(key, canonical_json(values, indent=1).encode())
    held = {} if work.before is None else work.before.list_digests
    changed = [(view, digest) for view, digest in result.list_digests.items() if held.get(view) != digest]
    for view, digest in changed:
        target.put(list_key(view, digest), result.entries[view].to_bytes())
    text = result.to_json().encode()
    tag = target.create(MANIFEST, text) if work.tag is None else target.replace(MANIFEST, text, work.tag)
    if tag is None:
        raise StoreBusy(
            f"another process has written to {str(target)!r} meanwhile: run the same command again"
        )
    named = {list_key(view, digest) for view, digest in result.list_digests.items()}
    for name in target.names(LISTS):
        if f"{LISTS}/{name}" not in named:
            target.delete(f"{LISTS}/{name}")
