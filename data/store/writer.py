"""Writing a store: blocks in, committed views out, nothing torn and nothing done twice after a kill.

One process at a time creates or extends the metadata. A worker computes a block, puts its shard files, then
one small done-object `blocks/<view>.<block>.json`. When every block of a view is done, the manifest is
replaced by one that vouches for that view, and its done-objects go. A block without its done-object is
computed again. What a block's files hold does not depend on who wrote them when, so neither does the store.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.canonical import canonical_json
from coursepack.data.store.block import Block, BlockFiles
from coursepack.data.store.contents import LISTS, list_key
from coursepack.data.store.done import BLOCKS, check_done, done_key, done_objects, read_done
from coursepack.data.store.layout import block_count, table_key
from coursepack.data.store.locations import open_location
from coursepack.data.store.manifest import MANIFEST
from coursepack.data.store.opening import check_not_foreign, has_object, load_tagged
from coursepack.data.store.owners import Part, owning
from coursepack.data.store.planning import StorePlan, extended_manifest, fresh_manifest
from coursepack.data.store.records import reduce_records
from coursepack.data.store.shards import shard_checksum, shard_pieces
from coursepack.data.store.zarr_metadata import METADATA, zarr_keys, zarr_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from coursepack.data.store.contents import FileEntry
    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest


class StoreWriter:
    """One process's hold on one part of a store. Use as a context manager."""

    def __init__(self, where: str | Path | Location, plan: StorePlan, part: Part | None = None) -> None:
        self.location = open_location(where)
        self.part = part or Part()
        self._plan = plan
        self._stack = ExitStack()
        self._manifest: Manifest
        self._tag = ""
        self._committed: dict[str, frozenset[int]] = {}
        self._whole_views: frozenset[int] = frozenset()
        """Views of which nothing of the plan is missing."""

    @property
    def manifest(self) -> Manifest:
        """The store's manifest as this writer last read or wrote it."""
        return self._manifest

    @manifest.setter
    def manifest(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._committed = {name: frozenset(views) for name, views in manifest.committed.items()}
        committed = [self._committed.get(name, frozenset()) for name in self._plan.arrays]
        self._whole_views = frozenset.intersection(*committed)

    def __enter__(self) -> Self:
        """Create or extend the store and take the part.

        Raises:
            StoreMismatch: the store was written by another recipe, source or teacher.
            StoreBusy: a live process owns blocks of this part.
        """
        # Refuse before anything is touched; the check is repeated under the lock.
        self.planned()
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
            if kind is None:
                with self.location.lock():
                    self._refresh()
                    self._sweep_leftovers()

    def planned(self) -> Manifest:
        """The manifest as `__enter__` would make it; nothing is written.

        Raises:
            StoreMismatch: the store was written by another recipe, source or teacher.
        """
        if self._exists():
            return self._extended(self._load())
        check_not_foreign(self.location)
        return fresh_manifest(self._plan)

    def blocks_left(self) -> list[Block]:
        """Blocks of this part that are not done, found without writing anything."""
        self.manifest = self.planned()
        return list(self.pending())

    @cached_property
    def blocks(self) -> int:
        """Blocks of one view, fixed for the store's life."""
        return block_count(self.manifest.samples, self.manifest.block_rows)

    def pending(self, order: Iterator[int] | None = None) -> Iterator[Block]:
        """Blocks of this part that are not done, view by view, each looked up just before it is given."""
        numbers = order if order is not None else iter(range(self.manifest.views * self.blocks))
        for number in numbers:
            if not self.part.owns(number):
                continue
            view, index = divmod(number, self.blocks)
            if view in self._whole_views or self._is_done(view, index, self._missing(view)):
                continue
            # Not done, or committed by another process that swept the done-object: the manifest knows.
            self._refresh()
            if missing := self._missing(view):
                yield self.block(view, index, missing)

    def done_rows(self) -> int:
        """Rows of this part that need no more work."""
        return self.owned_rows() - sum(len(block) for block in self.pending())

    def owned_rows(self) -> int:
        """Rows of this part in all."""
        rows, samples = self.manifest.block_rows, self.manifest.samples
        numbers = np.arange(self.part.index, self.manifest.views * self.blocks, self.part.count)
        return int(np.minimum(rows, samples - numbers % self.blocks * rows).sum())

    def write(
        self, block: Block, record: Mapping[str, Any], sound: Mapping[str, tuple[int, int]] | None = None
    ) -> BlockFiles:
        """Start writing a block; `record` goes into its done-object when `BlockFiles.finish` is called."""
        return BlockFiles(self.location, self.manifest, self._plan.labels, block, record, sound)

    def commit(self) -> None:
        """Vouch for every view whose blocks are all done, whoever did them, and tidy up behind it."""
        with self.location.lock():
            self._refresh()
            views = sorted({view for view, _ in done_objects(self.location)})
            self._update(lambda manifest: self._with_views(manifest, views))
            self._sweep_done_objects()

    def is_complete(self, view: int) -> bool:
        """Whether a view waits for nothing but `commit`."""
        missing = self._missing(view)
        return bool(missing) and all(self._is_done(view, index, missing) for index in range(self.blocks))

    def block(self, view: int, index: int, arrays: tuple[str, ...]) -> Block:
        """One block by its place."""
        start = index * self.manifest.block_rows
        return Block(view, index, start, min(start + self.manifest.block_rows, self.manifest.samples), arrays)

    def replace_files(self, files: Mapping[str, FileEntry]) -> None:
        """Vouch for files that were written again."""
        with self.location.lock():
            self._refresh()
            self._update(lambda manifest: manifest.with_files(files))

    def forget(self, views: Iterable[int]) -> None:
        """Vouch for some views no longer, so that their blocks are pending again."""
        with self.location.lock():
            self._refresh()
            gone = set(views)
            self._update(lambda manifest: manifest.only_views(set(manifest.entries) - gone))

    def repair_tables(self, keys: set[str]) -> dict[str, FileEntry]:
        """Write tables and metadata among `keys` again; returns size and crc32c of the tables' files."""
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
        """Read the manifest again if it was replaced since this writer read or wrote it."""
        if self.location.tag(MANIFEST) not in (None, self._tag):
            self.manifest = self._extended(self._load())

    def _update(self, change: Callable[[Manifest], Manifest]) -> None:
        """Replace the manifest by a changed one, made again as often as another process was faster."""
        while (manifest := change(self.manifest)) is not self.manifest and not self._put_manifest(manifest):
            self.manifest = self._extended(self._load())

    def _missing(self, view: int) -> tuple[str, ...]:
        """Quantities of the plan that are not committed for a view; others in the store are not our work."""
        return tuple(name for name in sorted(self._plan.arrays) if not self._is_committed(name, view))

    def _is_committed(self, name: str, view: int) -> bool:
        return view in self._committed.get(name, ())

    def _is_done(self, view: int, index: int, arrays: tuple[str, ...]) -> bool:
        if not arrays:
            return True
        entry = read_done(self.location, view, index)
        return entry is not None and set(arrays) <= set(entry["arrays"])

    def _with_views(self, manifest: Manifest, views: Iterable[int]) -> Manifest:
        """A manifest that vouches for those of some views whose blocks are all done."""
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
            # Statistics come from the logits: arrays that are added later leave them as they are.
            record = reduce_records([entry["record"] for entry in done])
            manifest = manifest.with_view(view, arrays, files, record)
        return manifest

    def _sweep_done_objects(self) -> None:
        """Remove the done-objects that the manifest has taken in."""
        for view, index in done_objects(self.location):
            entry = read_done(self.location, view, index)
            if entry and all(self._is_committed(name, view) for name in entry["arrays"]):
                self.location.delete(done_key(view, index))

    def _sweep_leftovers(self) -> None:
        """Remove what killed writers left: everywhere but in blocks that somebody may be writing now.

        Lists every folder, so it is done when a run begins and ends and not at every commit.
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
        # Without a lock, another process may have put a list that no manifest names yet.
        if self.location.has_locks and self.manifest.format_version > 1:
            named = {list_key(view, digest) for view, digest in self.manifest.list_digests.items()}
            for name in self.location.names(LISTS):
                if f"{LISTS}/{name}" not in named:
                    self.location.delete(f"{LISTS}/{name}")

    def _is_left_over(self, name: str) -> bool:
        """Whether a partial file is of metadata, or of a view of which nothing is left to write."""
        view = name.removeprefix("c.").partition(".")[0]
        return name.startswith(f"{METADATA}.") or (view.isdecimal() and int(view) in self._whole_views)

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
        """Write the tables whose keys are wanted; returns size and crc32c of their files."""
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
        """Zarr metadata; the group's own object comes last."""
        for key, values in zarr_metadata(manifest).items():
            if wanted(key):
                self.location.put(key, canonical_json(values, indent=1).encode())

    def _create_manifest(self, manifest: Manifest) -> bool:
        """Write the first manifest; returns whether there was none."""
        tag = self.location.create(MANIFEST, manifest.to_json().encode())
        if tag is not None:
            self.manifest, self._tag = manifest, tag
        return tag is not None

    def _put_manifest(self, manifest: Manifest) -> bool:
        """Replace the manifest if it is the one that was read, its lists first; returns whether it was."""
        before, after = self.manifest.list_digests.items(), manifest.list_digests.items()
        for view, digest in after - before:
            self.location.put(list_key(view, digest), manifest.entries[view].to_bytes())
        tag = self.location.replace(MANIFEST, manifest.to_json().encode(), self._tag)
        if tag is None:
            return False
        self.manifest, self._tag = manifest, tag
        for view, digest in before - after:
            self.location.delete(list_key(view, digest))
        return True
