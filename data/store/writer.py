"""Writing a store: blocks in, committed views out, nothing torn and nothing done twice after a kill.

One process at a time creates or extends the metadata. A worker computes a block, puts its shard files, then
one small done-object `blocks/<view>.<block>.json`. When every block of a view is done, the manifest is
replaced by one that vouches for that view, and its done-objects go. A block without its done-object is
computed again. What a block's files hold does not depend on who wrote them when, so neither does the store.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.canonical import canonical_json, difference_table, fingerprint
from coursepack.data.store.layout import block_count, plan_array, plan_block_rows, plan_labels, shard_key
from coursepack.data.store.manifest import (
    LABELS,
    MANIFEST,
    Manifest,
    StoredArray,
    check_not_foreign,
    load_manifest,
    zarr_metadata,
)
from coursepack.data.store.owners import Part, owning, store_lock
from coursepack.data.store.shards import shard_checksum, shard_pieces
from coursepack.errors import RecipeError, StoreMismatch
from coursepack.files import partials, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
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
        self._stack = ExitStack()
        self.manifest: Manifest

    def __enter__(self) -> Self:
        """Create or extend the store and take the part.

        Raises:
            StoreMismatch: the store was written by another recipe, source or teacher.
            StoreBusy: a live process owns blocks of this part.
        """
        # Refuse before anything is touched; the check is repeated under the lock.
        if (self.root / MANIFEST).is_file():
            self._extended(load_manifest(self.root))
        else:
            check_not_foreign(self.root)
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
            self.manifest = load_manifest(self.root)
            if missing := self._missing(view):
                start = index * self.manifest.block_rows
                stop = min(start + self.manifest.block_rows, self.manifest.samples)
                yield Block(view, index, start, stop, missing)

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

    def _missing(self, view: int) -> tuple[str, ...]:
        """Quantities of the plan that are not committed for a view; others in the store are not our work."""
        committed = self.manifest.committed
        return tuple(name for name in sorted(self._plan.arrays) if view not in committed.get(name, ()))

    def _done_path(self, view: int, index: int) -> Path:
        return self.root / BLOCKS / f"{view}.{index}.json"

    def _is_done(self, view: int, index: int, arrays: tuple[str, ...]) -> bool:
        if not arrays:
            return True
        try:
            entry = json.loads(self._done_path(view, index).read_text())
        except FileNotFoundError:
            return False
        return set(arrays) <= set(entry["arrays"])

    def _commit_view(self, view: int, arrays: tuple[str, ...]) -> None:
        done = [json.loads(self._done_path(view, index).read_text()) for index in range(self.blocks)]
        committed = {
            **self.manifest.committed,
            **{name: tuple(sorted((*self.manifest.committed.get(name, ()), view))) for name in arrays},
        }
        records = dict(self.manifest.view_records)
        # Statistics come from the logits: arrays that are added later leave them as they are.
        records.setdefault(str(view), _reduce([entry["record"] for entry in done]))
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
        _remove_partials(self.root / LABELS)

    def _create_or_extend(self) -> None:
        if (self.root / MANIFEST).is_file():
            stored = load_manifest(self.root)
            manifest = self._extended(stored)
            if manifest != stored:
                self._put_metadata(manifest)
                self._put_manifest(manifest)
            self.manifest = manifest
            return
        manifest = self._fresh()
        pieces = shard_pieces(self._plan.labels, manifest.labels)
        key = f"{LABELS}/c.0"
        (self.root / LABELS).mkdir(exist_ok=True)
        write_whole(self.root / key, *pieces)
        self._put_metadata(manifest)
        self._put_manifest(manifest.with_files({key: (sum(map(len, pieces)), shard_checksum(pieces))}))

    def _fresh(self) -> Manifest:
        plan, rows = self._plan, len(self._plan.labels)
        components = {name: encoding.components(shape) for name, (encoding, shape) in plan.arrays.items()}
        widths = [part.row_bytes for parts in components.values() for part in parts.values()]
        block_rows = self._asked_block_rows() or plan_block_rows(rows, widths)
        return Manifest(
            identity=plan.identity,
            origin=plan.origin,
            samples=rows,
            class_names=plan.class_names,
            views=plan.views,
            block_rows=block_rows,
            arrays=self._planned_arrays(block_rows),
            labels=plan_labels(rows),
        )

    def _asked_block_rows(self) -> int | None:
        """Rows of a block if the plan says so, at most all."""
        asked = self._plan.block_rows
        return None if asked is None else min(asked, len(self._plan.labels))

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
        if self._asked_block_rows() not in (None, stored.block_rows):
            raise RecipeError(
                f"block rows are {plan.block_rows}, but store {str(self.root)!r} was made with "
                f"{stored.block_rows} and keeps them: leave --block-rows out"
            )
        planned = self._planned_arrays(stored.block_rows)
        for name in planned.keys() & stored.arrays.keys():
            if planned[name] != stored.arrays[name]:
                table = difference_table(
                    stored.arrays[name].to_dict(), planned[name].to_dict(), "store", "recipe"
                )
                raise StoreMismatch(
                    f"store {str(self.root)!r} holds {name!r} in another form.\n{table}\nUse another --store."
                )
        arrays = {**planned, **stored.arrays}
        return replace(stored, arrays=arrays, views=max(plan.views, stored.views))

    def _put_metadata(self, manifest: Manifest) -> None:
        """Zarr metadata; the group's own file comes last."""
        for key, values in zarr_metadata(manifest).items():
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
            for component, part in manifest.arrays[name].encoding.encode(rows, samples).items():
                self._held[name, component].append(part)
                self._flush(name, component, full_only=True)

    def finish(self, statistics: Mapping[str, float]) -> None:
        """Write what is left, then the done-object. `statistics` are sums over the block's rows."""
        for name, component in self._held:
            self._flush(name, component, full_only=False)
        entry = {
            "arrays": list(self._block.arrays),
            "files": {key: list(value) for key, value in self._files.items()},
            "record": {**self._record, "sums": dict(statistics)},
        }
        path = self._writer._done_path(self._block.view, self._block.index)
        write_whole(path, canonical_json(entry).encode())

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
            self._files[key] = (sum(map(len, pieces)), shard_checksum(pieces))
            self._written[name, component] = written + min(len(rows), layout.shard_rows)
            rest = rows[layout.shard_rows :]
            held[:] = [rest] if len(rest) else []


def _remove_partials(folder: Path, prefix: str = "") -> None:
    for path in partials(folder):
        if path.name.startswith(prefix):
            path.unlink(missing_ok=True)


def _reduce(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One view's record from those of its blocks, in block order."""
    sums: dict[str, float] = {}
    for record in records:
        for name, value in record["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
    environments = []
    for record in records:
        if record["environment"] not in environments:
            environments.append(record["environment"])
    return {
        "sums": sums,
        "draws": [record["draws"] for record in records],
        "environments": environments,
    }
