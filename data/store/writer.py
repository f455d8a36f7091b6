"""Writing a store: blocks in, committed views out, nothing torn and nothing done twice after a kill.

One process at a time creates or extends the metadata. A worker computes a block, puts its shard files, then
one small done-object `blocks/<view>.<block>.json`. When every block of a view is done, the manifest is
replaced by one that vouches for that view, and its done-objects go. A block without its done-object is
computed again. What a block's files hold does not depend on who wrote them when, so neither does the store.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from coursepack.canonical import canonical_json
from coursepack.data.store.block import Block, BlockFiles
from coursepack.data.store.done import BLOCKS, check_done, done_objects, done_path, read_done
from coursepack.data.store.layout import (
    block_count,
    table_key,
)
from coursepack.data.store.manifest import (
    MANIFEST,
    Manifest,
    check_not_foreign,
    load_manifest,
    zarr_metadata,
)
from coursepack.data.store.owners import Part, owning, store_lock
from coursepack.data.store.planning import StorePlan, extended_manifest, fresh_manifest
from coursepack.data.store.records import reduce_records
from coursepack.data.store.shards import shard_checksum, shard_pieces
from coursepack.files import partials, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self


class StoreWriter:
    """One process's hold on one part of a store. Use as a context manager."""

    def __init__(self, root: Path, plan: StorePlan, part: Part | None = None) -> None:
        self.root = root
        self.part = part or Part()
        self._plan = plan
        self._stack = ExitStack()
        self.manifest: Manifest

    def __enter__(self) -> Self:
        """Create or extend the store and take the part.

        Raises:
            StoreMismatch: the store was written by another recipe, source or teacher.
            StoreBusy: a live process owns blocks of this part.
        """
        # Refuse before anything is touched; the check is repeated under the lock.
        self.planned()
        for folder in (self.root, self.root / BLOCKS):
            folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opening:
            opening.enter_context(owning(self.root, self.part))
            with store_lock(self.root):
                self._create_or_extend()
            self._stack = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def planned(self) -> Manifest:
        """The manifest as `__enter__` would make it; nothing is written.

        Raises:
            StoreMismatch: the store was written by another recipe, source or teacher.
        """
        if (self.root / MANIFEST).is_file():
            return extended_manifest(self._plan, load_manifest(self.root), self.root)
        check_not_foreign(self.root)
        return fresh_manifest(self._plan)

    def blocks_left(self) -> list[Block]:
        """Blocks of this part that are not done, found without writing anything."""
        self.manifest = self.planned()
        return list(self.pending())

    @property
    def blocks(self) -> int:
        """Blocks of one view."""
        return block_count(self.manifest.samples, self.manifest.block_rows)

    def pending(self, order: Iterator[int] | None = None) -> Iterator[Block]:
        """Blocks of this part that are not done, view by view, each looked up just before it is given."""
        numbers = order if order is not None else iter(range(self.manifest.views * self.blocks))
        for number in numbers:
            if not self.part.owns(number):
                continue
            view, index = divmod(number, self.blocks)
            if self._is_done(view, index, self._missing(view)):
                continue
            # Not done, or committed by another process that swept the done-object: the manifest knows.
            if (self.root / MANIFEST).is_file():
                self.manifest = extended_manifest(self._plan, load_manifest(self.root), self.root)
            if missing := self._missing(view):
                yield self.block(view, index, missing)

    def done_rows(self) -> int:
        """Rows of this part that need no more work."""
        owned = [n for n in range(self.manifest.views * self.blocks) if self.part.owns(n)]
        return self.owned_rows() - sum(len(block) for block in self.pending(iter(owned)))

    def owned_rows(self) -> int:
        """Rows of this part in all."""
        rows, samples = self.manifest.block_rows, self.manifest.samples
        numbers = (n for n in range(self.manifest.views * self.blocks) if self.part.owns(n))
        return sum(min(rows, samples - n % self.blocks * rows) for n in numbers)

    def write(
        self, block: Block, record: Mapping[str, Any], sound: Mapping[str, tuple[int, int]] | None = None
    ) -> BlockFiles:
        """Start writing a block; `record` goes into its done-object when `BlockFiles.finish` is called."""
        return BlockFiles(self.root, self.manifest, self._plan.labels, block, record, sound)

    def commit(self) -> None:
        """Vouch for every view whose blocks are all done, whoever did them, and tidy up behind it."""
        with store_lock(self.root):
            self.manifest = load_manifest(self.root)
            for view in range(self.manifest.views):
                if self.is_complete(view):
                    self._commit_view(view, self._missing(view))
            self._sweep()

    def is_complete(self, view: int) -> bool:
        """Whether a view waits for nothing but `commit`."""
        missing = self._missing(view)
        return bool(missing) and all(self._is_done(view, index, missing) for index in range(self.blocks))

    def block(self, view: int, index: int, arrays: tuple[str, ...]) -> Block:
        """One block by its place."""
        start = index * self.manifest.block_rows
        return Block(view, index, start, min(start + self.manifest.block_rows, self.manifest.samples), arrays)

    def replace_files(self, files: dict[str, tuple[int, int]]) -> None:
        """Vouch for files that were written again."""
        with store_lock(self.root):
            self._put_manifest(load_manifest(self.root).with_files(files))

    def repair_tables(self, keys: set[str]) -> dict[str, tuple[int, int]]:
        """Write tables and metadata among `keys` again; returns size and crc32c of the tables' files."""
        self._put_metadata(self.manifest, lambda key: key in keys)
        return self._put_tables(self.manifest, lambda key: key in keys)

    def _missing(self, view: int) -> tuple[str, ...]:
        """Quantities of the plan that are not committed for a view; others in the store are not our work."""
        committed = self.manifest.committed
        return tuple(name for name in sorted(self._plan.arrays) if view not in committed.get(name, ()))

    def _is_done(self, view: int, index: int, arrays: tuple[str, ...]) -> bool:
        if not arrays:
            return True
        entry = read_done(self.root, view, index)
        return entry is not None and set(arrays) <= set(entry["arrays"])

    def _commit_view(self, view: int, arrays: tuple[str, ...]) -> None:
        entries = [read_done(self.root, view, index) for index in range(self.blocks)]
        done = [entry for entry in entries if entry is not None]
        for index, entry in enumerate(done):
            check_done(self.root, self.manifest, view, index, entry)
        committed = {
            **self.manifest.committed,
            **{name: tuple(sorted((*self.manifest.committed.get(name, ()), view))) for name in arrays},
        }
        records = dict(self.manifest.view_records)
        # Statistics come from the logits: arrays that are added later leave them as they are.
        records.setdefault(str(view), reduce_records([entry["record"] for entry in done]))
        files = {
            key: (size, crc)
            for entry in done
            for key, (size, crc) in entry["files"].items()
            if key.startswith(tuple(f"{name}/" for name in arrays))
        }
        manifest = replace(self.manifest, committed=committed, view_records=records).with_files(files)
        self._put_manifest(manifest)

    def _sweep(self) -> None:
        """Remove done-objects that the manifest has taken in, and what killed writers left behind."""
        for view, index in done_objects(self.root):
            entry = read_done(self.root, view, index)
            if entry and all(view in self.manifest.committed.get(name, ()) for name in entry["arrays"]):
                done_path(self.root, view, index).unlink()
        for view in range(self.manifest.views):
            if not self._missing(view):
                _remove_partials(self.root / BLOCKS, f"{view}.")
                for name in self._plan.arrays:
                    for component in self.manifest.arrays[name].components:
                        _remove_partials(self.root / name / component, f"c.{view}.")
        _remove_partials(self.root)
        for name in self.manifest.tables:
            _remove_partials(self.root / name)

    def _create_or_extend(self) -> None:
        if (self.root / MANIFEST).is_file():
            stored = load_manifest(self.root)
            manifest = extended_manifest(self._plan, stored, self.root)
            self.manifest = manifest
            if manifest != stored:
                self._put_metadata(manifest)
                self._put_manifest(self._put_missing_tables(manifest))
            return
        self._put_metadata(fresh_manifest(self._plan))
        self._put_manifest(self._put_missing_tables(fresh_manifest(self._plan)))

    def _put_tables(self, manifest: Manifest, wanted: Callable[[str], bool]) -> dict[str, tuple[int, int]]:
        """Write the tables whose keys are wanted; returns size and crc32c of their files."""
        files = {}
        for name, values in self._plan.tables().items():
            layout = manifest.tables[name].layout
            key = table_key(name, layout)
            if wanted(key):
                pieces = shard_pieces(values, layout)
                write_whole(self.root / key, *pieces)
                files[key] = (sum(map(len, pieces)), shard_checksum(pieces))
        return files

    def _put_missing_tables(self, manifest: Manifest) -> Manifest:
        return manifest.with_files(self._put_tables(manifest, lambda key: key not in manifest.files))

    def _put_metadata(self, manifest: Manifest, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Zarr metadata; the group's own file comes last."""
        for key, values in zarr_metadata(manifest).items():
            path = self.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            if wanted(key):
                write_whole(path, canonical_json(values, indent=1).encode())

    def _put_manifest(self, manifest: Manifest) -> None:
        write_whole(self.root / MANIFEST, manifest.to_json().encode())
        self.manifest = manifest


def _remove_partials(folder: Path, prefix: str = "") -> None:
    for path in partials(folder):
        if path.name.startswith(prefix):
            path.unlink(missing_ok=True)
