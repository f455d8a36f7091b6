"""Manifest members that differ between versions of the format: committed views, files and records.

version 1   the manifest contains everything and therefore grows with every view
version 2   the manifest references one list per view by its sha256; see `contents`
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from coursepack.canonical import canonical_json, checked_lines, fingerprint
from coursepack.data.store.contents import Entries, ViewEntry, digest_of, list_key, view_of
from coursepack.data.store.layout import table_key, whole
from coursepack.data.store.records import TOTALS, add_totals, merge_environments
from coursepack.data.store.validation import (
    check_committed,
    check_entry,
    check_files,
    file_entries,
    listed,
    mapping,
    view_number,
)
from coursepack.errors import CoursepackError, StoreDamaged
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from coursepack.data.store.contents import FileEntry
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest

MAX_LIST_BYTES = 32 << 20
"""Maximum size of a list of a view, checked before it is read."""
_DIGEST = re.compile("[0-9a-f]{64}")


class Version(NamedTuple):
    """Serialization of the version-dependent members of a manifest."""

    describe: Callable[[Manifest], dict[str, Any]]
    """Function that returns these members as plain values."""
    parse: Callable[[Manifest, dict[str, Any], Location | None], Manifest]
    """Function that parses plain values and returns the manifest with these members.

    Raises:
        ValueError, LookupError, TypeError: the values are invalid; describes the defect.
    """
    spell: Callable[[dict[str, Any], str], str]
    """Function that returns the text of a manifest, with a member of the given name for its checksum."""


def _describe_1(manifest: Manifest) -> dict[str, Any]:
    return {
        "committed": {name: list(views) for name, views in manifest.committed.items()},
        "view_records": dict(manifest.view_records),
        "files": {key: list(value) for key, value in manifest.files.items()},
    }


def _parse_1(manifest: Manifest, values: dict[str, Any], _: Location | None) -> Manifest:
    committed = {name: tuple(map(whole, views)) for name, views in values["committed"].items()}
    records = {
        view_number(view, manifest): mapping(record)
        for view, record in mapping(values["view_records"]).items()
    }
    tables = {table_key(name, table.layout) for name, table in manifest.tables.items()}
    table_files: dict[str, FileEntry] = {}
    files: dict[int, dict[str, FileEntry]] = {}
    for key, file in file_entries(values["files"]).items():
        (table_files if key in tables else files.setdefault(view_of(key), {}))[key] = file
    views = {*records, *files, *chain(*committed.values())}
    entries = {view: ViewEntry(files.get(view, {}), records.get(view)) for view in views}
    found = replace(manifest, committed=committed, entries=entries, table_files=table_files)
    check_committed(found)
    check_files(found, table_files, None)
    for view, entry in entries.items():
        check_entry(found, view, entry)
    return replace(
        found,
        environments=merge_environments((), records.values()),
        totals=add_totals({}, records.values()),
    )


def _describe_2(manifest: Manifest) -> dict[str, Any]:
    return {
        "committed": {name: _ranges(views) for name, views in manifest.committed.items()},
        "environments": list(manifest.environments),
        "files": {key: list(value) for key, value in manifest.table_files.items()},
        "totals": manifest.totals,
        "view_lists": {str(view): digest for view, digest in manifest.list_digests.items()},
    }


def _parse_2(manifest: Manifest, values: dict[str, Any], location: Location | None) -> Manifest:
    digests = {view_number(view, manifest): digest for view, digest in mapping(values["view_lists"]).items()}
    for digest in listed(list(digests.values()), str):
        if _DIGEST.fullmatch(digest) is None:
            raise ValueError(f"{digest!r:.80} is no sha256")
    environments = tuple(listed(values["environments"], dict))
    for environment in environments:
        whole(environment.get("batch_size", 1), 1)
    totals = mapping(values["totals"])
    if any(type(totals[name]) not in (int, float) for name in TOTALS):
        raise ValueError(f"totals are {totals!r:.80}")
    found = replace(
        manifest,
        committed={name: _views(ranges, len(digests)) for name, ranges in values["committed"].items()},
        table_files=file_entries(values["files"]),
        environments=environments,
        totals={name: float(totals[name]) for name in TOTALS},
    )
    check_committed(found)
    check_files(found, found.table_files, None)
    if {*chain(*found.committed.values())} != {*digests}:
        raise ValueError("the views that are committed are not those that have lists")
    return replace(found, entries=Entries(digests, ListReader(found, location)))


def _spell_1(values: dict[str, Any], checksum: str) -> str:
    return canonical_json({**values, checksum: fingerprint(values)}, indent=1)


VERSIONS = {1: Version(_describe_1, _parse_1, _spell_1), 2: Version(_describe_2, _parse_2, checked_lines)}


@dataclass(frozen=True)
class ListReader:
    """Reader and validator of the lists of a store's views."""

    manifest: Manifest
    """Manifest of the store, with or without entries."""
    location: Location | None

    def __call__(self, view: int, digest: str) -> ViewEntry:
        """Read the list of a view.

        Raises:
            StoreDamaged: the list is missing, unreadable, invalid or does not match its digest.
        """
        key, location = list_key(view, digest), self.location
        if location is None:
            raise StoreDamaged(f"the manifest names {key!r}, but there is nothing to read it from")
        try:
            text = location.get(key, MAX_LIST_BYTES)
            if digest_of(text) != digest:
                raise ValueError("does not match its checksum")
            values = parse_json(text)
            entry = ViewEntry(file_entries(values["files"]), mapping(values["record"]))
            check_entry(self.manifest, view, entry)
        except FileNotFoundError as error:
            newer = self._replaced(location, view, digest)
            if newer is None:
                raise _damaged(location, key, "is missing") from error
            return newer
        except OSError as error:
            raise _damaged(location, key, f"cannot be read: {error.strerror or error}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _damaged(location, key, f"{error}"[:300]) from error
        return entry

    def _replaced(self, location: Location, view: int, digest: str) -> ViewEntry | None:
        """Return the view's current entry if a writer has replaced its list meanwhile, else None."""
        from coursepack.data.store.opening import load_manifest

        try:
            now = load_manifest(location)
        except CoursepackError:
            return None
        is_newer = isinstance(now.entries, Entries) and now.entries.digests.get(view, digest) != digest
        return now.entries[view] if is_newer and now.fingerprint == self.manifest.fingerprint else None


def _damaged(location: Location, key: str, fault: str) -> StoreDamaged:
    return StoreDamaged(
        f"the list of a view {location.where(key)!r} {fault}. Run `precompute verify --store {location} "
        "--repair`, which writes damaged files again."
    )


def _ranges(views: Sequence[int]) -> list[list[int]]:
    """Return start and stop of each run of consecutive views."""
    ranges: list[list[int]] = []
    for view in views:
        if ranges and ranges[-1][1] == view:
            ranges[-1][1] = view + 1
        else:
            ranges.append([view, view + 1])
    return ranges


def _views(ranges: Iterable[Any], most: int) -> tuple[int, ...]:
    """Expand ranges into views, at most `most`, which bounds the memory that a forged range can claim."""
    pairs = [(whole(start), whole(stop)) for start, stop in ranges]
    if sum(stop - start for start, stop in pairs) > most or any(stop <= start for start, stop in pairs):
        raise ValueError(f"{pairs!r:.80} are no ranges of at most {most} committed views")
    return tuple(chain.from_iterable(range(*pair) for pair in pairs))
