"""A block of a store: its row range, and a writer for its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.canonical import canonical_json
from coursepack.data.store.done import done_key
from coursepack.data.store.layout import shard_key
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.records import divergences, fidelity
from coursepack.data.store.shards import shard_checksum, shard_pieces
from coursepack.errors import EncodingRange

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from coursepack.data.store.locations.base import Location
    from coursepack.data.store.manifest import Manifest


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one view: the unit of work and of resuming."""

    view: int
    index: int
    start: int
    stop: int
    arrays: tuple[str, ...]
    """Names of the quantities still to be written for the block."""

    @property
    def samples(self) -> NDArray[np.int64]:
        """Sample indices of the rows of the block."""
        return np.arange(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


class BlockFiles:
    """Writer for the files of one block. Shards are written once full, which bounds memory by one shard."""

    def __init__(
        self,
        location: Location,
        manifest: Manifest,
        labels: NDArray[np.int64],
        block: Block,
        record: Mapping[str, Any],
        sound: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Start a block.

        Args:
            location: location of the store.
            manifest: manifest of the store.
            labels: class ids of all samples `(N,)`.
            block: the block to write.
            record: members of the done-object other than sums and fidelity: `draws` and `environment`.
            sound: size and crc32c of existing files; those that would not change are not rewritten.
        """
        self._location, self._manifest, self._labels = location, manifest, labels
        self._block, self._record, self._sound = block, record, sound or {}
        self._files: dict[str, tuple[int, int]] = {}
        self._divergences: list[dict[str, NDArray[np.float64]]] = []
        self._held: dict[tuple[str, str], list[NDArray[Any]]] = {}
        self._written: dict[tuple[str, str], int] = {}
        for name in block.arrays:
            for component in manifest.arrays[name].components:
                self._held[name, component] = []
                self._written[name, component] = 0

    def add(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Append the next rows of every array of the block, in sample order.

        Raises:
            EncodingRange: a value is outside the range of the array's encoding; names the array and the flag.
        """
        first = self._block.start + self._rows_seen()
        for name in self._block.arrays:
            rows = values[name]
            samples = np.arange(first, first + len(rows))
            encoding = self._manifest.arrays[name].encoding
            try:
                encoded = encoding.encode(rows, samples, self._labels[samples])
            except EncodingRange as error:
                flag = "--encoding" if name == LOGITS else "--feature-encoding"
                raise EncodingRange(f"{name}: {error} as {flag}.") from error
            if name == LOGITS and not encoding.exact:
                tensors = {component: torch.from_numpy(part) for component, part in encoded.items()}
                decoded = encoding.rows(tensors, rows.shape[1:])
                self._divergences.append(divergences(torch.from_numpy(rows), decoded))
            for component, part in encoded.items():
                self._held[name, component].append(part)
                self._flush(name, component, full_only=True)

    def finish(self, statistics: Mapping[str, float]) -> None:
        """Write the remaining rows, then the done-object. `statistics` are sums over the block's rows."""
        entry = {
            "arrays": list(self._block.arrays),
            "files": {key: list(value) for key, value in self.flush().items()},
            "record": {**self._record, "sums": dict(statistics), "fidelity": fidelity(self._divergences)},
        }
        key = done_key(self._block.view, self._block.index)
        self._location.put(key, canonical_json(entry).encode())

    def flush(self) -> dict[str, tuple[int, int]]:
        """Write the remaining rows and return size and crc32c of every file of the block."""
        for name, component in self._held:
            self._flush(name, component, full_only=False)
        return self._files

    def _rows_seen(self) -> int:
        name, component = next(iter(self._held))
        return self._written[name, component] + sum(map(len, self._held[name, component]))

    def _flush(self, name: str, component: str, *, full_only: bool) -> None:
        layout = self._manifest.arrays[name].components[component]
        held = self._held[name, component]
        while held and (sum(map(len, held)) >= layout.shard_rows or not full_only):
            rows = np.concatenate(held) if len(held) > 1 else held[0]
            written = self._written[name, component]
            shard = (self._block.start + written) // layout.shard_rows
            key = shard_key(f"{name}/{component}", self._block.view, shard, layout)
            pieces = shard_pieces(rows[: layout.shard_rows], layout)
            self._files[key] = (sum(map(len, pieces)), shard_checksum(pieces))
            if self._sound.get(key) != self._files[key]:
                self._location.put(key, *pieces)
            self._written[name, component] = written + min(len(rows), layout.shard_rows)
            rest = rows[layout.shard_rows :]
            held[:] = [rest] if len(rest) else []
