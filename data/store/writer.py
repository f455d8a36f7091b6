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
    zarr_keys,
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
        self._seen: tuple[int, ...] = ()

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
                self._sweep_partials()
            self._stack = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                with store_lock(self.root):
                    self._refresh()
                    self._sweep_partials()

    def planned(self) -> Manifest:
        """The manifest as `__enter__` would make it; nothing is written.

        Raises:
            StoreMismatch: the store was written by another recipe, source or teacher.
        """
        if (self.root / MANIFEST).is_file():
            return extended_manifest(self._plan, self._load(), self.root)
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
            self._refresh()
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
            self._refresh()
            views = sorted({view for view, _ in done_objects(self.root)})
            manifest = self.manifest
            for view in views:
                if self.is_complete(view):
                    manifest = self._with_view(manifest, view)
            if manifest is not self.manifest:
                self._put_manifest(manifest)
            self._sweep_done_objects()

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
            self._put_manifest(self._load().with_files(files))

    def repair_tables(self, keys: set[str]) -> dict[str, tuple[int, int]]:
        """Write tables and metadata among `keys` again; returns size and crc32c of the tables' files."""
        self._put_metadata(self.manifest, lambda key: key in keys)
        return self._put_tables(self.manifest, lambda key: key in keys)

    def _load(self) -> Manifest:
        self._seen = _file_state(self.root / MANIFEST)
        return load_manifest(self.root)

    def _refresh(self) -> None:
        """Read the manifest again if it was replaced since this writer read or wrote it."""
        if (state := _file_state(self.root / MANIFEST)) and state != self._seen:
            self.manifest = extended_manifest(self._plan, self._load(), self.root)

    def _missing(self, view: int) -> tuple[str, ...]:
        """Quantities of the plan that are not committed for a view; others in the store are not our work."""
        committed = self.manifest.committed
        return tuple(name for name in sorted(self._plan.arrays) if view not in committed.get(name, ()))

    def _is_done(self, view: int, index: int, arrays: tuple[str, ...]) -> bool:
        if not arrays:
            return True
        entry = read_done(self.root, view, index)
        return entry is not None and set(arrays) <= set(entry["arrays"])

    def _with_view(self, manifest: Manifest, view: int) -> Manifest:
        """A manifest that vouches for one view more, whose blocks are all done."""
        arrays = self._missing(view)
        entries = [read_done(self.root, view, index) for index in range(self.blocks)]
        done = [entry for entry in entries if entry is not None]
        for index, entry in enumerate(done):
            check_done(self.root, manifest, view, index, entry)
        committed = {
            **manifest.committed,
            **{name: tuple(sorted((*manifest.committed.get(name, ()), view))) for name in arrays},
        }
        records = dict(manifest.view_records)
        # Statistics come from the logits: arrays that are added later leave them as they are.
        records.setdefault(str(view), reduce_records([entry["record"] for entry in done]))
        files = {
            key: (size, crc)
            for entry in done
            for key, (size, crc) in entry["files"].items()
            if key.startswith(tuple(f"{name}/" for name in arrays))
        }
        return replace(manifest, committed=committed, view_records=records).with_files(files)

    def _sweep_done_objects(self) -> None:
        """Remove the done-objects that the manifest has taken in."""
        for view, index in done_objects(self.root):
            entry = read_done(self.root, view, index)
            if entry and all(view in self.manifest.committed.get(name, ()) for name in entry["arrays"]):
                done_path(self.root, view, index).unlink()

    def _sweep_partials(self) -> None:
        """Remove what killed writers left: everywhere but in blocks that somebody may be writing now.

        Lists every folder, so it is done once a run and not at every commit.
        """
        for key in zarr_keys(self.manifest):
            _remove_partials((self.root / key).parent, "zarr.json.")
        for folder in (self.root, *(self.root / name for name in self.manifest.tables)):
            _remove_partials(folder)
        _remove_partials(self.root / BLOCKS, "", self._is_whole)
        for name in self._plan.arrays:
            for component in self.manifest.arrays[name].components:
                _remove_partials(self.root / name / component, "c.", self._is_whole)

    def _is_whole(self, name: str) -> bool:
        """Whether nothing is left to write of the view with which a file's name begins."""
        view = name.partition(".")[0]
        return view.isdecimal() and int(view) < self.manifest.views and not self._missing(int(view))

    def _create_or_extend(self) -> None:
        if (self.root / MANIFEST).is_file():
            stored = self._load()
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
        self.manifest, self._seen = manifest, _file_state(self.root / MANIFEST)


def _file_state(path: Path) -> tuple[int, ...]:
    """What changes whenever a file is replaced; empty if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _remove_partials(folder: Path, prefix: str = "", wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Remove partial files whose names begin with `prefix` and whose rest is wanted."""
    for path in partials(folder):
        if path.name.startswith(prefix) and wanted(path.name.removeprefix(prefix)):
            path.unlink(missing_ok=True)
