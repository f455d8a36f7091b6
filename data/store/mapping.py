"""Memory-mapped views of stored quantities, with shards checked and chunk addresses precomputed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from coursepack.data.store.gather import ALIGNMENT, copy_rows
from coursepack.data.store.layout import ArrayLayout
from coursepack.data.store.shards import (
    CHECKSUM_BYTES,
    FileCheck,
    checksum_bytes,
    chunk_offsets,
    file_checksum,
    stored_checksum,
)
from coursepack.errors import StoreDamaged
from coursepack.threads import map_in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.store.locations.base import Location, Mapped

Check = Literal["files", "chunks", "nothing"]
DOWNLOADS = 2
"""Number of times that a shard is downloaded until it matches its checksum."""
READERS = 2
"""Number of shards of an array that are read into memory at a time: one is read while another is verified."""


@dataclass(frozen=True)
class ShardFile:
    """A shard file with the size and checksum listed in the manifest."""

    location: Location
    key: str
    size: int
    crc: int

    def damaged(self, fault: str, what: str = "") -> StoreDamaged:
        """Return an error about this file; `what` names the affected part and `fault` the defect."""
        return StoreDamaged(
            f"{what}{self.location.where(self.key)!r} {fault}. Run `precompute verify --store "
            f"{self.location} --repair`, which writes damaged files again."
        )

    def open(self, layout: ArrayLayout, *, resident: bool, whole: bool = True) -> Mapped:
        """Memory-map the file, or read it into memory if `resident`, and compare its checksum.

        Args:
            layout: layout of the array.
            resident: read into memory, verifying what has been read meanwhile.
            whole: verify all data; otherwise only the stored checksums, which identify the shard.

        Raises:
            StoreDamaged: the file is missing, has another size, or does not match its checksum.
        """
        check = FileCheck(layout)
        try:
            # Check the size before reading: a file that is not the shard may have any length.
            resident = resident and self.location.size(self.key) == self.size
            opened = self.location.map(self.key, resident=resident, check=check)
        except FileNotFoundError as error:
            raise self.damaged("is missing") from error
        content = opened.content
        if len(content) != self.size:
            raise self.damaged(f"has {len(content)} bytes, expected {self.size}")
        if (check.checksum(content) if whole else stored_checksum(content, layout)) != self.crc:
            raise self.damaged("does not match its checksum", "the content of ")
        return opened

    def read(self, layout: ArrayLayout) -> NDArray[np.uint8]:
        """Read the whole file into memory and verify it.

        Raises:
            StoreDamaged: the file is missing, has another size, or does not match its checksum.
        """
        if not self.location.is_remote:
            return self.open(layout, resident=True).content
        for _ in range(DOWNLOADS):
            try:
                content = self.location.map(self.key).content
            except FileNotFoundError as error:
                raise self.damaged("is missing") from error
            if len(content) == self.size and file_checksum(content, layout) == self.crc:
                return content
        raise self.damaged("does not match its checksum", "the content of ")


Shards = dict[str, tuple[ArrayLayout, list[ShardFile]]]
"""Layout and ordered shard files of every component of a quantity's rows."""


class OpenView:
    """Open view of one quantity, with rows in mapped files or resident in memory."""

    def __init__(
        self,
        components: Shards,
        rows: int,
        *,
        resident: bool,
        check: Check,
        pinned: bool = False,
    ) -> None:
        """Open and check all shards.

        Args:
            components: layout and ordered shard files of every component of a row.
            rows: number of rows of the view.
            resident: read the files into memory instead of mapping them.
            check: scope of checksum verification: `files` verifies whole files now; `chunks` verifies each
                chunk on first access, for files too large to read in advance; `nothing` skips verification,
                for files that this process has already verified.
            pinned: gather into page-locked memory, from which a GPU can copy asynchronously.

        Raises:
            StoreDamaged: a file is missing, has another size, or does not match its checksum.
        """
        self.rows, self.pinned = rows, pinned
        self.parts = [
            Component(name, layout, shards, rows, resident=resident, whole=check == "files")
            for name, (layout, shards) in components.items()
        ]
        places = [(part.addresses.ctypes.data, part.layout.chunk_rows, part.row_bytes) for part in self.parts]
        self.table = np.array(places, dtype=np.int64)
        self._unchecked = {part.name: np.full(len(part.addresses), check == "chunks") for part in self.parts}
        self._trusted = check != "chunks"

    def check(self, samples: Samples) -> None:
        """Check what has to be checked before these samples are read.

        Raises:
            StoreDamaged: a chunk does not match its checksum on first access, or a file was truncated since
                it was mapped.
        """
        for part in self.parts:
            part.check_sizes()
        if not self._trusted:
            self._check_chunks(samples[(samples >= 0) & (samples < self.rows)])

    def pieces(self) -> Iterator[NDArray[Any]]:
        """Yield all rows `(n, *row_shape)` of a view of one component, chunk by chunk, without a copy."""
        (part,) = self.parts
        rows = part.layout.chunk_rows
        for chunk in range(len(part.addresses)):
            yield part.piece(chunk, min(rows, self.rows - chunk * rows))

    def check_unchanged(self) -> None:
        """Check that mapped files have not been changed since they were opened.

        Raises:
            StoreDamaged: a file was changed; names the first such file.
        """
        for part in self.parts:
            part.check_unchanged()

    def will_need(self, samples: Samples) -> None:
        """Advise the system to read the chunks of these samples in the background."""
        for part in self.parts:
            for chunk in part.chunks_of(samples):
                part.advise(int(chunk))

    def _check_chunks(self, samples: Samples) -> None:
        for part in self.parts:
            unchecked = self._unchecked[part.name]
            chunks = part.chunks_of(samples)
            for chunk in chunks[unchecked[chunks]]:
                part.check_chunk(int(chunk))
                unchecked[chunk] = False


def gather(views: Sequence[OpenView], samples: Samples) -> list[dict[str, NDArray[Any]]]:
    """Return the rows `(n, *row_shape)` of every component of some views, read together.

    Raises:
        IndexError: a sample is out of range.
        StoreDamaged: a chunk does not match its checksum on first access, or a file was truncated since it
            was mapped.
    """
    samples = np.ascontiguousarray(samples, dtype=np.int64)
    count, rows = len(samples), min(view.rows for view in views)
    for view in views:
        view.check(samples)
    parts = [part for view in views for part in view.parts]
    sizes = [-(-count * part.row_bytes // ALIGNMENT) * ALIGNMENT for part in parts]
    out = buffer(sum(sizes), pinned=all(view.pinned for view in views))
    outside = copy_rows(_joined([view.table for view in views]), rows, samples, out)
    if outside >= 0:
        raise IndexError(f"sample {samples[outside]} was asked for, expected 0 to {rows - 1}")
    result: list[dict[str, NDArray[Any]]] = []
    place = iter(sizes)
    start = 0
    for view in views:
        found = {}
        for part in view.parts:
            found[part.name] = np.ndarray((count, *part.row_shape), part.dtype, out, start)
            start += next(place)
        result.append(found)
    return result


def _joined(tables: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return tables of `copy_rows` as one."""
    if len(tables) == 1:
        return tables[0]
    # A concatenation would take twice as long.
    return np.frombuffer(b"".join(table.data for table in tables), np.int64).reshape(-1, 3)


def buffer(size: int, *, pinned: bool) -> NDArray[np.uint8]:
    """Return memory of a size in bytes, page-locked if `pinned`."""
    if pinned:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()
    return np.empty(size, dtype=np.uint8)


def _open_shards(
    shards: list[ShardFile], layout: ArrayLayout, *, resident: bool, whole: bool
) -> list[Mapped]:
    open_shard = partial(ShardFile.open, layout=layout, resident=resident, whole=whole)
    if not resident or len(shards) == 1:
        return [open_shard(shard) for shard in shards]
    return list(map_in_threads(READERS, open_shard, shards))


class Component:
    """Shards of one component array of one view."""

    def __init__(
        self,
        name: str,
        layout: ArrayLayout,
        shards: list[ShardFile],
        rows: int,
        *,
        resident: bool,
        whole: bool,
    ) -> None:
        self.name, self.layout = name, layout
        # Computed once: gathering a batch takes only tens of microseconds.
        self.dtype, self.row_bytes, self.row_shape = (
            np.dtype(layout.dtype),
            layout.row_bytes,
            layout.row_shape,
        )
        self._shards, self._resident = shards, resident
        self._opened = _open_shards(shards, layout, resident=resident, whole=whole)
        self._sizes = [(opened.size, shard) for opened, shard in zip(self._opened, shards, strict=True)]
        addresses = []
        for place, (opened, shard) in enumerate(zip(self._opened, shards, strict=True)):
            held = min(layout.shard_rows, rows - place * layout.shard_rows)
            offsets = chunk_offsets(opened.content, held, layout, shard.key)
            addresses.append(offsets + opened.content.ctypes.data)
        self.addresses = np.concatenate(addresses)

    def chunks_of(self, samples: Samples) -> NDArray[np.int64]:
        """Return the chunks that hold the samples, in ascending order."""
        # Faster than np.unique, which sorts or hashes all samples.
        return np.flatnonzero(np.bincount(samples // self.layout.chunk_rows))

    def advise(self, chunk: int) -> None:
        """Advise the system to read a chunk in the background."""
        place, start = self._place(chunk)
        self._opened[place].advise(start, self.layout.chunk_rows * self.row_bytes)

    def piece(self, chunk: int, count: int) -> NDArray[Any]:
        """Return the first `count` rows of a chunk, not copied and perhaps not aligned."""
        place, start = self._place(chunk)
        raw = self._opened[place].content[start : start + count * self.row_bytes]
        return raw.view(self.dtype).reshape(count, *self.row_shape)

    def check_chunk(self, chunk: int) -> None:
        """Verify the checksum of one chunk.

        Raises:
            StoreDamaged: the chunk does not match its checksum.
        """
        place, start = self._place(chunk)
        end = start + self.layout.chunk_rows * self.row_bytes
        content = self._opened[place].content
        if checksum_bytes(content[start:end]) != content[end : end + CHECKSUM_BYTES].tobytes():
            raise self._shards[place].damaged("does not match its checksum", f"chunk {chunk} of ")

    def check_sizes(self) -> None:
        """Check that mapped files were not truncated: accessing missing pages raises SIGBUS."""
        if self._resident:
            return
        for current_size, shard in self._sizes:
            if (found := current_size()) < shard.size:
                raise shard.damaged(
                    f"was changed while it was read: it has {found} bytes, expected {shard.size}"
                )

    def check_unchanged(self) -> None:
        """Check that mapped files were not changed in place, verifying again those with new timestamps."""
        self.check_sizes()
        for opened, shard in zip(self._opened, self._shards, strict=True):
            if opened.is_touched() and file_checksum(opened.content, self.layout) != shard.crc:
                raise shard.damaged(
                    "was changed while it was read, and no longer matches its checksum: rows read since it "
                    "was opened may be wrong"
                )

    def _place(self, chunk: int) -> tuple[int, int]:
        """Return the shard index of a chunk and its byte offset in the shard file."""
        place = chunk * self.layout.chunk_rows // self.layout.shard_rows
        return place, int(self.addresses[chunk]) - self._opened[place].content.ctypes.data
