"""Writer of stores: writes blocks and commits views, atomically and resumably.

One process at a time creates or extends the metadata. A worker computes a block, writes its shard files, then
one small done-object `blocks/<view>.<block>.json`. When every block of a view is done, the manifest is
replaced by one that includes that view, and its done-objects are removed. A block without a done-object is
computed again. The contents of a block's files, and thus of the store, do not depend on which worker wrote
them, or when.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.canonical import canonical_json
from coursepack.data.store.block import Block, BlockFiles
from coursepack.data.store.contents import LISTS, Entries, list_key
from coursepack.data.store.done import BLOCKS, check_done, done_key, done_objects, read_done
from coursepack.data.store.layout import block_count, table_key
from coursepack.data.store.locations import open_location
from coursepack.data.store.manifest import MANIFEST
from coursepack.data.store.opening import check_not_copied, check_not_foreign, has_object, load_tagged
from coursepack.data.store.owners import Part, owning
from coursepack.data.store.planning import StorePlan, extended_manifest, fresh_manifest
from coursepack.data.store.records import reduce_records
from coursepack.data.store.shards import shard_checksum, shard_pieces
from coursepack.data.store.versions import ListReader
from coursepack.data.store.zarr_metadata import METADATA, zarr_keys, zarr_metadata
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from coursepack.data.store.contents import FileEntry
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest


class StoreWriter:
    """Writer of one part of a store, owned by one process. Use as a context manager."""

    def __init__(
        self,
        where: str | Path | Location,
        plan: StorePlan,
        part: Part | None = None,
        *,
        single_writer: bool = False,
    ) -> None:
        """Prepare to write a store; nothing is written before `__enter__`.

        Args:
            where: path or address of the store.
            plan: planned contents of the store.
            part: share of the blocks to write. Defaults to all.
            single_writer: no other process writes to the store; required where the location cannot detect
                that.
        """
        self.location, self._single_writer = open_location(where), single_writer
        self.part = part or Part()
        self._plan = plan
        self._stack = ExitStack()
        self._manifest: Manifest
        self._tag = ""
        self._committed: dict[str, frozenset[int]] = {}
        self._whole_views: frozenset[int] = frozenset()
        """Views for which all arrays of the plan are committed."""

    @property
    def manifest(self) -> Manifest:
        """Manifest of the store, as last read or written by this writer."""
        return self._manifest

    @manifest.setter
    def manifest(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._committed = {name: frozenset(views) for name, views in manifest.committed.items()}
        committed = [self._committed.get(name, frozenset()) for name in self._plan.arrays]
        self._whole_views = frozenset.intersection(*committed)

    def __enter__(self) -> Self:
        """Create or extend the store and acquire the part.

        Raises:
            StoreMismatch: the store was written by another recipe, source or teacher.
            StoreBusy: a live process owns blocks of this part.
            StoreIncomplete: the store is being copied to, or a copy to it was interrupted.
            RecipeError: the location cannot detect other writers, and `single_writer` is false.
        """
        # Fail before anything is modified; the check is repeated under the lock.
        self.planned()
        check_not_copied(self.location)
        if self._single_writer and self.part.count > 1:
            raise RecipeError(
                f"part {self.part} is not the only one to be written: leave --single-writer out"
            )
        self.location.begin_writing(single_writer=self._single_writer)
        with ExitStack() as opening:
            opening.enter_context(owning(self.location, self.part))
            with self.location.lock():
                self._create_or_extend()
                self._sweep_leftovers()
            self._stack = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            # A writer of all blocks has removed the leftovers of others at the start, and leaves none itself.
            if kind is None and self.part.count > 1:
                with self.location.lock():
                    self._refresh()
                    self._sweep_leftovers()

    def planned(self) -> Manifest:
        """Return the manifest that `__enter__` would create, without writing anything.

        Raises:
            StoreMismatch: the store was written by another recipe, source or teacher.
        """
        if self._exists():
            return self._extended(self._load())
        check_not_foreign(self.location)
        return fresh_manifest(self._plan)

    def blocks_left(self) -> list[Block]:
        """Return the unfinished blocks of this part without writing anything."""
        self.manifest = self.planned()
        return list(self._unfinished())

    @cached_property
    def blocks(self) -> int:
        """Number of blocks of one view; never changes."""
        return block_count(self.manifest.samples, self.manifest.block_rows)

    def open_views(self) -> list[int]:
        """Return the views that lack a committed array, in ascending order."""
        return [view for view in range(self.manifest.views) if view not in self._whole_views]

    def pending(self, order: Iterable[int] | None = None) -> Iterator[Block]:
        """Yield the unfinished blocks of this part, view by view; each is checked just before its turn."""
        if order is None:
            order = (view * self.blocks + index for view in self.open_views() for index in range(self.blocks))
        for number in order:
            if not self.part.owns(number):
                continue
            view, index = divmod(number, self.blocks)
            if view in self._whole_views or self._is_done(view, index, self._missing(view)):
                continue
            # Unfinished, or committed by another process that removed the done-object: check the manifest.
            self._refresh()
            if missing := self._missing(view):
                yield self.block(view, index, missing)

    def _unfinished(self) -> Iterator[Block]:
        """Yield the blocks of this part that are unfinished now.

        Lists the done-objects and reads those, whereas `pending` makes requests for every block.
        """
        found = set(done_objects(self.location))
        self._refresh()
        for view in self.open_views():
            arrays = self._missing(view)
            for index in range(self.blocks):
                if not self.part.owns(view * self.blocks + index):
                    continue
                if (view, index) not in found or not self._is_done(view, index, arrays):
                    yield self.block(view, index, arrays)

    def done_rows(self) -> int:
        """Return the number of finished rows of this part."""
        return self.owned_rows() - sum(len(block) for block in self._unfinished())

    def owned_rows(self) -> int:
        """Return the total number of rows of this part."""
        rows, samples = self.manifest.block_rows, self.manifest.samples
        numbers = np.arange(self.part.index, self.manifest.views * self.blocks, self.part.count)
        return int(np.minimum(rows, samples - numbers % self.blocks * rows).sum())

    def write(
        self, block: Block, record: Mapping[str, Any], sound: Mapping[str, tuple[int, int]] | None = None
    ) -> BlockFiles:
        """Start writing a block; `record` goes into its done-object when `BlockFiles.finish` is called."""
        return BlockFiles(self.location, self.manifest, self._plan.labels, block, record, sound)

    def commit(self) -> None:
        """Commit every view whose blocks are all done, by any worker, and remove their done-objects."""
        with self.location.lock():
            self._refresh()
            done = Counter(view for view, _ in done_objects(self.location))
            views = sorted(view for view, count in done.items() if count >= self.blocks)
            self._update(lambda manifest: self._with_views(manifest, views))
            self._sweep_done_objects()

    def is_complete(self, view: int) -> bool:
        """Return True if all blocks of a view are done and it is not committed yet."""
        missing = self._missing(view)
        # From the last, which is usually the last to be done: then no other object is read before that.
        indices = reversed(range(self.blocks))
        return bool(missing) and all(self._is_done(view, index, missing) for index in indices)

    def block(self, view: int, index: int, arrays: tuple[str, ...]) -> Block:
        """Return a block by view and index."""
        start = index * self.manifest.block_rows
        return Block(view, index, start, min(start + self.manifest.block_rows, self.manifest.samples), arrays)

    def replace_files(self, files: Mapping[str, FileEntry]) -> None:
        """Update size and checksum of rewritten files in the manifest."""
        with self.location.lock():
            self._refresh()
            self._update(lambda manifest: manifest.with_files(files))

    def forget(self, views: Iterable[int]) -> None:
        """Remove views from the manifest, so that their blocks are pending again."""
        with self.location.lock():
            self._refresh()
            gone = set(views)
            self._update(lambda manifest: manifest.only_views(set(manifest.entries) - gone))

    def repair_tables(self, keys: set[str]) -> dict[str, FileEntry]:
        """Rewrite the tables and metadata in `keys`; returns size and crc32c of the tables' files."""
        self._put_metadata(self.manifest, lambda key: key in keys)
        return self._put_tables(self.manifest, lambda key: key in keys)

    def _exists(self) -> bool:
        return has_object(self.location, MANIFEST)

    def _load(self) -> Manifest:
        manifest, self._tag = load_tagged(self.location)
        return manifest

    def _extended(self, stored: Manifest) -> Manifest:
        return extended_manifest(self._plan, stored, str(self.location))

    def _refresh(self) -> None:
        """Reload the manifest if it was replaced since this writer last read or wrote it."""
        if self.location.tag(MANIFEST) not in (None, self._tag):
            self.manifest = self._extended(self._load())

    def _update(self, change: Callable[[Manifest], Manifest]) -> None:
        """Replace the manifest by a changed one, retrying after concurrent updates by other processes."""
        while (manifest := change(self.manifest)) is not self.manifest and not self._put_manifest(manifest):
            self.manifest = self._extended(self._load())

    def _missing(self, view: int) -> tuple[str, ...]:
        """Return the quantities of the plan not yet committed for a view, ignoring other stored ones."""
        return tuple(name for name in sorted(self._plan.arrays) if not self._is_committed(name, view))

    def _is_committed(self, name: str, view: int) -> bool:
        return view in self._committed.get(name, ())

    def _is_done(self, view: int, index: int, arrays: tuple[str, ...]) -> bool:
        if not arrays:
            return True
        entry = read_done(self.location, view, index)
        return entry is not None and set(arrays) <= set(entry["arrays"])

    def _with_views(self, manifest: Manifest, views: Iterable[int]) -> Manifest:
        """Return a manifest that includes those of the given views whose blocks are all done."""
        for view in views:
            arrays = self._missing(view)
            entries = [read_done(self.location, view, index) for index in range(self.blocks)]
            done = [entry for entry in entries if entry is not None and set(arrays) <= set(entry["arrays"])]
            if not arrays or len(done) < self.blocks:
                continue
            for index, entry in enumerate(done):
                check_done(self.location, manifest, view, index, entry)
            files = {
                key: (size, crc)
                for entry in done
                for key, (size, crc) in entry["files"].items()
                if key.startswith(tuple(f"{name}/" for name in arrays))
            }
            # Statistics are computed from logits, so arrays added later do not change them.
            record = reduce_records([entry["record"] for entry in done])
            manifest = manifest.with_view(view, arrays, files, record)
        return manifest

    def _sweep_done_objects(self) -> None:
        """Remove the done-objects of committed blocks."""
        for view, index in done_objects(self.location):
            if all(self._is_committed(name, view) for name in self.manifest.arrays):
                self.location.delete(done_key(view, index))
                continue
            entry = read_done(self.location, view, index)
            if entry and all(self._is_committed(name, view) for name in entry["arrays"]):
                self.location.delete(done_key(view, index))

    def _sweep_leftovers(self) -> None:
        """Remove leftovers of killed writers, except in blocks that another process may be writing.

        Lists every folder, so it runs only at the start or end of a run and not at every commit.
        """
        folders = {key.rpartition("/")[0] for key in zarr_keys(self.manifest)}
        mine = {
            f"{name}/{component}"
            for name in self._plan.arrays
            for component in self.manifest.arrays[name].components
        }
        for folder in folders | {BLOCKS, LISTS}:
            if folder in {"", LISTS, *self.manifest.tables}:
                self.location.sweep(folder, lambda _: True)
            elif folder in mine | {BLOCKS}:
                self.location.sweep(folder, self._is_left_over)
            else:
                self.location.sweep(folder, lambda name: name.startswith(f"{METADATA}."))
        # Without a lock, another process may have written a list that no manifest references yet.
        if self.location.has_locks and self.manifest.format_version > 1:
            named = {list_key(view, digest) for view, digest in self.manifest.list_digests.items()}
            for name in self.location.names(LISTS):
                if f"{LISTS}/{name}" not in named:
                    self.location.delete(f"{LISTS}/{name}")

    def _is_left_over(self, name: str) -> bool:
        """Return True if no other process can be writing a partial file.

        It belongs to metadata or to a fully committed view, or this writer owns all blocks.
        """
        view = name.removeprefix("c.").partition(".")[0]
        is_whole = view.isdecimal() and int(view) in self._whole_views
        return is_whole or self.part.count == 1 or name.startswith(f"{METADATA}.")

    def _create_or_extend(self) -> None:
        while True:
            if not self._exists():
                manifest = fresh_manifest(self._plan)
                self._put_metadata(manifest)
                manifest = self._put_missing_tables(manifest)
                if self._create_manifest(manifest):
                    return
            stored = self._load()
            self.manifest = manifest = self._extended(stored)
            if (manifest.views, manifest.arrays, manifest.tables) == (
                stored.views,
                stored.arrays,
                stored.tables,
            ):
                return
            self._put_metadata(manifest)
            if self._put_manifest(self._put_missing_tables(manifest)):
                return

    def _put_tables(self, manifest: Manifest, wanted: Callable[[str], bool]) -> dict[str, FileEntry]:
        """Write the tables whose keys `wanted` selects; returns size and crc32c of their files."""
        files = {}
        for name, values in self._plan.tables().items():
            layout = manifest.tables[name].layout
            key = table_key(name, layout)
            if wanted(key):
                pieces = shard_pieces(values, layout)
                self.location.put(key, *pieces)
                files[key] = (sum(map(len, pieces)), shard_checksum(pieces))
        return files

    def _put_missing_tables(self, manifest: Manifest) -> Manifest:
        return manifest.with_files(self._put_tables(manifest, lambda key: key not in manifest.table_files))

    def _put_metadata(self, manifest: Manifest, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Write the Zarr metadata, the root group's object last."""
        for key, values in zarr_metadata(manifest).items():
            if wanted(key):
                self.location.put(key, canonical_json(values, indent=1).encode())

    def _create_manifest(self, manifest: Manifest) -> bool:
        """Create the manifest; returns False if one already exists."""
        tag = self.location.create(MANIFEST, manifest.to_json().encode())
        if tag is not None:
            self.manifest, self._tag = manifest, tag
        return tag is not None

    def _put_manifest(self, manifest: Manifest) -> bool:
        """Write new lists and replace the manifest; returns False if it was changed by another process."""
        before, after = self.manifest.list_digests, manifest.list_digests
        for view, digest in _missing_in(before, after):
            self.location.put(list_key(view, digest), manifest.entries[view].to_bytes())
        tag = self.location.replace(MANIFEST, manifest.to_json().encode(), self._tag)
        if tag is None:
            return False
        self.manifest, self._tag = _written(manifest, self.location), tag
        for view, digest in _missing_in(after, before):
            self.location.delete(list_key(view, digest))
        return True


def _written(manifest: Manifest, location: Location) -> Manifest:
    """Return a manifest that reads its lists when they are used, not those that it was made from."""
    if not isinstance(manifest.entries, Entries):
        return manifest
    reader = ListReader(replace(manifest, entries={}), location)
    return replace(manifest, entries=manifest.entries.written(reader))


def _missing_in(others: Mapping[int, str], digests: Mapping[int, str]) -> list[tuple[int, str]]:
    """Return view and digest of the lists in `digests` that `others` lacks."""
    return [(view, digest) for view, digest in digests.items() if others.get(view) != digest]
