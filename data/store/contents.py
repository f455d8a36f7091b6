"""The part of a manifest that grows with every view: files with their checksums, and a record per view.

In format version 1, the manifest contains all of it. In version 2, each view has its own list, an object that
the manifest references by its sha256. A list is read when its view is first accessed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coursepack.canonical import canonical_json

if TYPE_CHECKING:
    from collections.abc import Callable, Container

LISTS = "views"
"""Folder that contains the lists of views."""
MAX_KEPT = 16
"""Maximum number of entries that were read and are kept in memory."""
FileEntry = tuple[int, int]
"""Size in bytes and `shard_checksum` of a data file."""
_SHARD = re.compile(r"c\.([0-9]{1,15})\.")


@dataclass(frozen=True)
class ViewEntry:
    """Files and record of one view, as listed in the manifest."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    """Size and checksum of the data files of all committed arrays, by key."""
    record: dict[str, Any] | None = None
    """Statistics, digests of the drawn parameters per block, and environments; see `records`."""

    def to_bytes(self) -> bytes:
        """Return the canonical text of the view's list."""
        files = {key: list(value) for key, value in self.files.items()}
        return canonical_json({"files": files, "record": self.record}).encode()


class Entries(Mapping[int, ViewEntry]):
    """Lazily loaded mapping from views to their entries, of which those read last are kept."""

    def __init__(
        self,
        digests: Mapping[int, str],
        read: Callable[[int, str], ViewEntry],
        added: Mapping[int, ViewEntry] | None = None,
    ) -> None:
        """Create the mapping from the digests of the lists.

        Args:
            digests: sha256 of each view's list.
            read: function that reads and checks the list of a view.
            added: entries whose lists are not written yet.
        """
        self.digests, self._read, self._added = dict(digests), read, dict(added or {})
        self._kept: dict[tuple[int, str], ViewEntry] = {}

    def __getitem__(self, view: int) -> ViewEntry:
        place = (view, self.digests[view])
        entry = self._added.get(view) or self._kept.get(place)
        if entry is None:
            entry = self._read(*place)
            if len(self._kept) >= MAX_KEPT:
                # Another thread may have done the same.
                with suppress(StopIteration, RuntimeError):
                    self._kept.pop(next(iter(self._kept)), None)
            self._kept[place] = entry
        return entry

    def __contains__(self, view: object) -> bool:
        return view in self.digests

    def __iter__(self) -> Iterator[int]:
        return iter(self.digests)

    def __len__(self) -> int:
        return len(self.digests)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and self.digests == other.digests

    __hash__ = None  # type: ignore[assignment]  # a mapping

    def changed(self, entries: Mapping[int, ViewEntry]) -> Entries:
        """Return a copy in which the given entries are added or replaced."""
        digests = {view: digest_of(entry.to_bytes()) for view, entry in entries.items()}
        return self._copy({**self.digests, **digests}, {**self._added, **entries})

    def only(self, views: Container[int]) -> Entries:
        """Return a copy restricted to the given views."""
        digests = {view: digest for view, digest in self.digests.items() if view in views}
        return self._copy(digests, {view: entry for view, entry in self._added.items() if view in views})

    def written(self, read: Callable[[int, str], ViewEntry]) -> Entries:
        """Return a copy of which all lists are written, and are read with another function."""
        return Entries(self.digests, read)

    def _copy(self, digests: Mapping[int, str], added: Mapping[int, ViewEntry]) -> Entries:
        copy = Entries(digests, self._read, added)
        copy._kept = self._kept
        return copy


class Files(Mapping[str, FileEntry]):
    """Size and checksum of every data file in the manifest, by key."""

    def __init__(self, tables: Mapping[str, FileEntry], entries: Mapping[int, ViewEntry]) -> None:
        self._tables, self._entries = tables, entries

    def __getitem__(self, key: str) -> FileEntry:
        if key in self._tables:
            return self._tables[key]
        return self._entries[view_of(key)].files[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._tables
        for view in sorted(self._entries):
            yield from self._entries[view].files

    def __len__(self) -> int:
        return len(self._tables) + sum(len(entry.files) for entry in self._entries.values())


class Records(Mapping[str, dict[str, Any]]):
    """Records of views, by the decimal text of the view."""

    def __init__(self, entries: Mapping[int, ViewEntry]) -> None:
        self._entries = entries

    def __getitem__(self, view: str) -> dict[str, Any]:
        record = self._entries[int(view)].record if view.isdecimal() else None
        if record is None:
            raise KeyError(view)
        return record

    def __iter__(self) -> Iterator[str]:
        # An entry without a record occurs only in version 1, where all entries are in memory.
        is_read = isinstance(self._entries, dict)
        for view in sorted(self._entries):
            if not is_read or self._entries[view].record is not None:
                yield str(view)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def view_of(key: str) -> int:
    """Return the view of a data file, or -1 if its key contains none."""
    match = _SHARD.match(key.rpartition("/")[2])
    return -1 if match is None else int(match[1])


def digest_of(text: bytes) -> str:
    """Return the sha256 by which a manifest references a list."""
    return hashlib.sha256(text).hexdigest()


def list_key(view: int, digest: str) -> str:
    """Return the key of a view's list. Lists are immutable: the key depends on the digest."""
    return f"{LISTS}/{view}.{digest[:16]}.json"
