"""Writing a store: blocks in, committed views out, nothing torn and nothing done twice after a kill.

One process at a time creates or extends the metadata. A worker computes a block, puts its shard files, then
one small done-object `blocks/<view>.<block>.json`. When every block of a view is done, the manifest is
replaced by one that vouches for that view, and its done-objects go. A block without its done-object is
computed again. What a block's files hold does not depend on who wrote them when, so neither does the store.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.canonical import canonical_json, difference_table, fingerprint
from coursepack.data.store.layout import (
    array_metadata,
    block_count,
    group_metadata,
    plan_array,
    plan_block_rows,
    plan_table,
    shard_key,
    table_key,
)
from coursepack.data.store.manifest import (
    FORMAT_VERSION,
    LABELS,
    LOGITS,
    MANIFEST,
    STATIC,
    Manifest,
    StoredArray,
    Table,
    load_manifest,
)
from coursepack.data.store.owners import Part, owning, store_lock
from coursepack.data.store.records import fidelity, merge_fidelity, reduce_records
from coursepack.data.store.shards import checksum_of, shard_pieces
from coursepack.errors import RecipeError, StoreMismatch
from coursepack.files import partials, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from coursepack.data.encodings import Encoding

BLOCKS = "blocks"


@dataclass(frozen=True)
class StorePlan:
    """What a store is to hold, before any of it exists."""

    identity: dict[str, Any]
    """See `Manifest.identity`."""
    origin: dict[str, Any]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    views: int
    arrays: dict[str, tuple[Encoding, tuple[int, ...]]]
    """Encoding and row shape of each quantity."""
    static: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """What belongs to the teacher and not to samples, at least one-dimensional."""
    block_rows: int | None = None
    """Rows of a block; None leaves it to the rows' widths (or to the store, if it exists)."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one view: the unit of work and of resuming."""

    view: int
    index: int
    start: int
    stop: int
    arrays: tuple[str, ...]
    """The quantities that are still to be written for it."""

    @property
    def samples(self) -> NDArray[np.int64]:
        """Sample indices of its rows."""
        return np.arange(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


class StoreWriter:
    """One process's hold on one part of a store. Use as a context manager."""

    def __init__(self, root: Path, plan: StorePlan, part: Part | None = None) -> None:
        self.root = root
        self.part = part or Part()
        self._plan = plan
        self.labels = plan.labels
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
        exists = (self.root / MANIFEST).is_file()
        return self._extended(load_manifest(self.root)) if exists else self._fresh()

    def rows_left(self) -> int:
        """Rows of this part that are not done, found without writing anything."""
        self.manifest = self.planned()
        return sum(len(block) for block in self.pending())

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
            missing = self._missing(view)
            if missing and not self._is_done(view, index, missing):
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

    def write(self, block: Block, record: Mapping[str, Any]) -> BlockFiles:
        """Start writing a block; `record` goes into its done-object when `BlockFiles.finish` is called."""
        return BlockFiles(self, block, dict(record))

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
        """Write tables among `keys` again, and all metadata; returns size and crc32c of the tables' files."""
        self._put_metadata(self.manifest)
        return self._put_tables(self.manifest, lambda key: key in keys)

    def _missing(self, view: int) -> tuple[str, ...]:
        """Quantities of the plan that are not committed for a view; others in the store are not our work."""
        committed = self.manifest.committed
        return tuple(name for name in sorted(self._plan.arrays) if view not in committed.get(name, ()))

    def _done_path(self, view: int, index: int) -> Path:
        return self.root / BLOCKS / f"{view}.{index}.json"

    def _is_done(self, view: int, index: int, arrays: tuple[str, ...]) -> bool:
        path = self._done_path(view, index)
        return path.is_file() and set(arrays) <= set(json.loads(path.read_text())["arrays"])

    def _commit_view(self, view: int, arrays: tuple[str, ...]) -> None:
        done = [json.loads(self._done_path(view, index).read_text()) for index in range(self.blocks)]
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
        for path in sorted((self.root / BLOCKS).glob("*.json")):
            view = int(path.name.partition(".")[0])
            arrays = json.loads(path.read_text())["arrays"]
            if all(view in self.manifest.committed.get(name, ()) for name in arrays):
                path.unlink()
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
            manifest = self._extended(stored)
            self.manifest = manifest
            if manifest != stored:
                self._put_metadata(manifest)
                self._put_manifest(self._put_missing_tables(manifest))
            return
        self._put_metadata(self._fresh())
        self._put_manifest(self._put_missing_tables(self._fresh()))

    def _fresh(self) -> Manifest:
        plan, rows = self._plan, len(self._plan.labels)
        components = {name: encoding.components(shape) for name, (encoding, shape) in plan.arrays.items()}
        widths = [part.row_bytes for parts in components.values() for part in parts.values()]
        block_rows = plan_block_rows(rows, widths) if plan.block_rows is None else min(plan.block_rows, rows)
        return Manifest(
            identity=plan.identity,
            origin=plan.origin,
            samples=rows,
            class_names=plan.class_names,
            views=plan.views,
            block_rows=block_rows,
            arrays=self._planned_arrays(block_rows),
            tables=self._planned_tables(),
        )

    def _tables(self) -> dict[str, NDArray[Any]]:
        return {LABELS: self._plan.labels, **{f"{STATIC}/{k}": v for k, v in self._plan.static.items()}}

    def _planned_tables(self) -> dict[str, Table]:
        return {
            name: Table(len(values), plan_table(len(values), str(values.dtype), values.shape[1:]))
            for name, values in self._tables().items()
        }

    def _put_tables(self, manifest: Manifest, wanted: Callable[[str], bool]) -> dict[str, tuple[int, int]]:
        """Write the tables whose keys are wanted; returns size and crc32c of their files."""
        files = {}
        for name, values in self._tables().items():
            layout = manifest.tables[name].layout
            key = table_key(name, layout)
            if wanted(key):
                pieces = shard_pieces(values, layout)
                write_whole(self.root / key, *pieces)
                files[key] = (sum(map(len, pieces)), checksum_of(pieces))
        return files

    def _put_missing_tables(self, manifest: Manifest) -> Manifest:
        return manifest.with_files(self._put_tables(manifest, lambda key: key not in manifest.files))

    def _planned_arrays(self, block_rows: int) -> dict[str, StoredArray]:
        return {
            name: StoredArray(
                encoding,
                shape,
                {part: plan_array(spec, block_rows) for part, spec in encoding.components(shape).items()},
            )
            for name, (encoding, shape) in self._plan.arrays.items()
        }

    def _extended(self, stored: Manifest) -> Manifest:
        """The stored manifest with the views and arrays that the plan adds."""
        plan = self._plan
        if fingerprint(plan.identity) != stored.fingerprint:
            table = difference_table(stored.identity, plan.identity, "store", "recipe")
            raise StoreMismatch(
                f"store {str(self.root)!r} was written by another recipe.\n{table}\n"
                "Use another --store, or the recipe that wrote this one."
            )
        if plan.block_rows not in (None, stored.block_rows):
            raise RecipeError(
                f"block rows are {plan.block_rows}, but store {str(self.root)!r} was made with "
                f"{stored.block_rows} and keeps them: leave --block-rows out"
            )
        planned = self._planned_arrays(stored.block_rows)
        for name in sorted(planned.keys() & stored.arrays.keys()):
            forms = [
                {"encoding": array.encoding.to_dict(), "row_shape": list(array.row_shape)}
                for array in (stored.arrays[name], planned[name])
            ]
            if forms[0] != forms[1]:
                raise StoreMismatch(
                    f"store {str(self.root)!r} holds {name!r} in another form.\n"
                    f"{difference_table(*forms, 'store', 'recipe')}\nUse another --store."
                )
        return replace(
            stored,
            arrays={**planned, **stored.arrays},
            tables={**self._planned_tables(), **stored.tables},
            views=max(plan.views, stored.views),
        )

    def _put_metadata(self, manifest: Manifest) -> None:
        """Zarr metadata, innermost first: the group's own file comes last."""
        groups = {""}
        for array, (layout, shape) in manifest.zarr_arrays().items():
            parents = array.split("/")[:-1]
            groups |= {"/".join(parents[: depth + 1]) for depth in range(len(parents))}
            self._put_json(f"{array}/zarr.json", array_metadata(layout, shape))
        for group in sorted(groups, reverse=True):
            attributes = {} if group else {"coursepack": {"format_version": FORMAT_VERSION}}
            self._put_json(f"{group}/zarr.json" if group else "zarr.json", group_metadata(attributes))

    def _put_json(self, key: str, values: Any) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, canonical_json(values, indent=1).encode())

    def _put_manifest(self, manifest: Manifest) -> None:
        write_whole(self.root / MANIFEST, manifest.to_json().encode())
        self.manifest = manifest


class BlockFiles:
    """The files of one block, written as their shards fill, so that memory is bounded by a shard."""

    def __init__(self, writer: StoreWriter, block: Block, record: dict[str, Any]) -> None:
        self._writer, self._block, self._record = writer, block, record
        self._files: dict[str, tuple[int, int]] = {}
        self._fidelity: dict[str, Any] = {}
        self._held: dict[tuple[str, str], list[NDArray[Any]]] = {}
        self._written: dict[tuple[str, str], int] = {}
        for name in block.arrays:
            for component in writer.manifest.arrays[name].components:
                self._held[name, component] = []
                self._written[name, component] = 0

    def add(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Append the next rows of every array of the block, in the order of samples.

        Raises:
            EncodingRange: a value that the array's encoding cannot hold.
        """
        manifest = self._writer.manifest
        first = self._block.start + self._rows_seen()
        for name in self._block.arrays:
            rows = values[name]
            samples = np.arange(first, first + len(rows))
            encoding = manifest.arrays[name].encoding
            encoded = encoding.encode(rows, samples, self._writer.labels[samples])
            if name == LOGITS and not encoding.exact:
                tensors = {component: torch.from_numpy(part) for component, part in encoded.items()}
                decoded = encoding.rows(tensors, rows.shape[1:])
                self._fidelity = merge_fidelity(self._fidelity, fidelity(torch.from_numpy(rows), decoded))
            for component, part in encoded.items():
                self._held[name, component].append(part)
                self._flush(name, component, full_only=True)

    def finish(self, statistics: Mapping[str, float]) -> None:
        """Write what is left, then the done-object. `statistics` are sums over the block's rows."""
        entry = {
            "arrays": list(self._block.arrays),
            "files": {key: list(value) for key, value in self.flush().items()},
            "record": {**self._record, "sums": dict(statistics), "fidelity": self._fidelity},
        }
        path = self._writer._done_path(self._block.view, self._block.index)
        write_whole(path, canonical_json(entry).encode())

    def flush(self) -> dict[str, tuple[int, int]]:
        """Write what is left; returns size and crc32c of every file of the block."""
        for name, component in self._held:
            self._flush(name, component, full_only=False)
        return self._files

    def _rows_seen(self) -> int:
        name, component = next(iter(self._held))
        return self._written[name, component] + sum(map(len, self._held[name, component]))

    def _flush(self, name: str, component: str, *, full_only: bool) -> None:
        layout = self._writer.manifest.arrays[name].components[component]
        held = self._held[name, component]
        while held and (sum(map(len, held)) >= layout.shard_rows or not full_only):
            rows = np.concatenate(held) if len(held) > 1 else held[0]
            written = self._written[name, component]
            shard = (self._block.start + written) // layout.shard_rows
            key = shard_key(f"{name}/{component}", self._block.view, shard, layout)
            pieces = shard_pieces(rows[: layout.shard_rows], layout)
            write_whole(self._writer.root / key, *pieces)
            self._files[key] = (sum(map(len, pieces)), checksum_of(pieces))
            self._written[name, component] = written + min(len(rows), layout.shard_rows)
            rest = rows[layout.shard_rows :]
            held[:] = [rest] if len(rest) else []


def _remove_partials(folder: Path, prefix: str = "") -> None:
    for path in partials(folder):
        if path.name.startswith(prefix):
            path.unlink(missing_ok=True)
