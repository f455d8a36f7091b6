"""The part of a manifest that grows with every view: files with their checksums, and a record per view.

In format version 1 all of it stands in the manifest. In version 2 each view has a list of its own, an object
that the manifest names by its sha256, and a list is read when something of its view is first wanted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coursepack.canonical import canonical_json

if TYPE_CHECKING:
    from collections.abc import Callable, Container

LISTS = "views"
"""Folder of the views' lists."""
FileEntry = tuple[int, int]
"""Size in bytes and `shard_checksum` of a data file."""
_SHARD = re.compile(r"c\.([0-9]{1,15})\.")


@dataclass(frozen=True)
class ViewEntry:
    """What a manifest vouches for of one view."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    """Data files of all committed arrays."""
    record: dict[str, Any] | None = None
    """Statistics, digests of the drawn parameters per block, and environments; see `records`."""

    def to_bytes(self) -> bytes:
        """The canonical text of the view's list."""
        files = {key: list(value) for key, value in self.files.items()}
        return canonical_json({"files": files, "record": self.record}).encode()


class Entries(Mapping[int, ViewEntry]):
    """Entries of views, read as they are needed."""

    def __init__(
        self,
        digests: Mapping[int, str],
        read: Callable[[int, str], ViewEntry],
        known: dict[tuple[int, str], ViewEntry] | None = None,
    ) -> None:
        """Entries by the digests of their lists.

        Args:
            digests: sha256 of each view's list.
            read: reads and checks the list of a view.
            known: entries by view and digest that need not be read; others are added.
        """
        self.digests, self._read = dict(digests), read
        self._known = {} if known is None else known

    def __getitem__(self, view: int) -> ViewEntry:
        place = (view, self.digests[view])
        if place not in self._known:
            self._known[place] = self._read(*place)
        return self._known[place]

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
        """These entries with some in the place of others."""
        digests = {view: digest_of(entry.to_bytes()) for view, entry in entries.items()}
        self._known.update({(view, digests[view]): entry for view, entry in entries.items()})
        return Entries({**self.digests, **digests}, self._read, self._known)

    def only(self, views: Container[int]) -> Entries:
        """Some of these entries."""
        digests = {view: digest for view, digest in self.digests.items() if view in views}
        return Entries(digests, self._read, self._known)


class Files(Mapping[str, FileEntry]):
    """Size and checksum of every data file that is vouched for, by its key."""

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
    """Records of views, by the view as text."""

    def __init__(self, entries: Mapping[int, ViewEntry]) -> None:
        self._entries = entries

    def __getitem__(self, view: str) -> dict[str, Any]:
        record = self._entries[int(view)].record if view.isdecimal() else None
        if record is None:
            raise KeyError(view)
        return record

    def __iter__(self) -> Iterator[str]:
        # Only of version 1, where all is in memory, may an entry have no record.
        is_read = isinstance(self._entries, dict)
        for view in sorted(self._entries):
            if not is_read or self._entries[view].record is not None:
                yield str(view)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def view_of(key: str) -> int:
    """The view of a data file; -1 for a key that names none."""
    match = _SHARD.match(key.rpartition("/")[2])
    return -1 if match is None else int(match[1])


def digest_of(text: bytes) -> str:
    """The digest by which a manifest names a list."""
    return hashlib.sha256(text).hexdigest()


def list_key(view: int, digest: str) -> str:
    """Key of a view's list. A list is never changed: another one has another key."""
    return f"{LISTS}/{view}.{digest[:16]}.json"
