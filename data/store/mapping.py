"""One view of one stored quantity, open: every shard checked, every chunk's address known."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from coursepack.data.store.shards import (
    CHECKSUM_BYTES,
    checksum_bytes,
    chunk_offsets,
    file_checksum,
    stored_checksum,
)
from coursepack.errors import StoreDamaged
from coursepack.files import naming, open_regular

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.store.layout import ArrayLayout

PAGE = mmap.PAGESIZE

Check = Literal["files", "chunks", "nothing"]


@dataclass(frozen=True)
class ShardFile:
    """A shard file as the manifest vouches for it."""

    root: Path
    key: str
    size: int
    crc: int

    @property
    def advice(self) -> str:
        """What to do about a bad one."""
        return f"Run `precompute verify --store {self.root} --repair`, which writes damaged files again."


class OpenView:
    """Rows of one view, wherever they are: in the files (mapped), or in memory (resident)."""

    def __init__(
        self,
        components: dict[str, tuple[ArrayLayout, list[ShardFile]]],
        rows: int,
        *,
        resident: bool,
        check: Check,
        pinned: bool = False,
    ) -> None:
        """Open and check all shards.

        Args:
            components: layout and files, in order, of everything that a row is made of.
            rows: rows of the view.
            resident: read the files into memory instead of mapping them.
            check: what to compare with its checksum: whole files now; each chunk before its first row is
                served, which suits files too large to read through first; or nothing, for files that this
                process has checked before.
            pinned: gather into page-locked memory, from which a GPU copies in the background.

        Raises:
            StoreDamaged: a file is missing, has another size, or does not match its checksum.
        """
        from coursepack.data.store.jit_gather import ALIGNMENT, gather_rows

        self._alignment, self._gather_rows = ALIGNMENT, gather_rows
        self._rows, self._pinned = rows, pinned
        self._parts: list[_Component] = []
        addresses: list[NDArray[np.int64]] = []
        first = 0
        for name, (layout, shards) in components.items():
            part = _Component(name, layout, first, shards, rows, resident=resident, whole=check == "files")
            addresses.append(part.addresses)
            first += len(part.addresses)
            self._parts.append(part)
        self._chunks = np.concatenate(addresses)
        self._table = np.array(
            [(part.first, part.layout.chunk_rows, part.row_bytes) for part in self._parts],
            dtype=np.int64,
        )
        self._unchecked = {part.name: np.full(len(part.addresses), check == "chunks") for part in self._parts}
        self._trusted = check != "chunks"

    def gather(self, samples: Samples) -> dict[str, NDArray[Any]]:
        """Rows `(n, *row_shape)` of every component.

        Raises:
            IndexError: a sample outside the view.
            StoreDamaged: a chunk that is served for the first time does not match its checksum, or a file
                was cut short since it was mapped.
        """
        samples = np.ascontiguousarray(samples, dtype=np.int64)
        count = len(samples)
        for part in self._parts:
            part.check_sizes()
        if not self._trusted:
            self._check_chunks(samples[(samples >= 0) & (samples < self._rows)])
        sizes = [-(-count * part.row_bytes // self._alignment) * self._alignment for part in self._parts]
        out = self._buffer(sum(sizes))
        outside = self._gather_rows(self._chunks, self._table, self._rows, samples, out.ctypes.data)
        if outside >= 0:
            raise IndexError(f"sample {samples[outside]} was asked for, expected 0 to {self._rows - 1}")
        rows, start = {}, 0
        for part, size in zip(self._parts, sizes, strict=True):
            raw = out[start : start + count * part.row_bytes]
            rows[part.name] = raw.view(part.dtype).reshape(count, *part.row_shape)
            start += size
        return rows

    def check_unchanged(self) -> None:
        """Refuse mapped files whose content is no longer what was opened.

        Raises:
            StoreDamaged: names the first such file.
        """
        for part in self._parts:
            part.check_unchanged()

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return np.empty(size, dtype=np.uint8)

    def will_need(self, samples: Samples) -> None:
        """Ask the system to read the chunks of these samples in the background."""
        for part in self._parts:
            for chunk in np.unique(samples // part.layout.chunk_rows):
                part.advise(int(chunk))

    def _check_chunks(self, samples: Samples) -> None:
        for part in self._parts:
            unchecked = self._unchecked[part.name]
            chunks = np.unique(samples // part.layout.chunk_rows)
            for chunk in chunks[unchecked[chunks]]:
                part.check_chunk(int(chunk))
                unchecked[chunk] = False


class _Stamp(NamedTuple):
    """What changes when a file is written to."""

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        """The stamp in a file's status."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class _Component:
    """One array's shards of one view."""

    def __init__(
        self,
        name: str,
        layout: ArrayLayout,
        first: int,
        shards: list[ShardFile],
        rows: int,
        *,
        resident: bool,
        whole: bool,
    ) -> None:
        self.name, self.layout, self.first = name, layout, first
        # Looked up once: a batch is gathered in tens of microseconds.
        self.dtype, self.row_bytes, self.row_shape = (
            np.dtype(layout.dtype),
            layout.row_bytes,
            layout.row_shape,
        )
        self._shards = shards
        self._maps: list[mmap.mmap] = []
        self._files: list[NDArray[np.uint8]] = []
        self._stamps: list[_Stamp] = []
        addresses = []
        for place, shard in enumerate(shards):
            content = self._content(shard, resident=resident)
            # Which shard it is shows in the checksums it holds, even where its data is checked later.
            found = file_checksum(content, layout) if whole else stored_checksum(content, layout)
            if found != shard.crc:
                where = str(shard.root / shard.key)
                raise StoreDamaged(f"the content of {where!r} does not match its checksum. {shard.advice}")
            held = min(layout.shard_rows, rows - place * layout.shard_rows)
            addresses.append(chunk_offsets(content, held, layout, shard.key) + content.ctypes.data)
            self._files.append(content)
        self.addresses = np.concatenate(addresses)

    def advise(self, chunk: int) -> None:
        """Have a mapped chunk read in the background."""
        place, start = self._place(chunk)
        if place < len(self._maps) and hasattr(mmap, "MADV_WILLNEED"):
            aligned = start - start % PAGE
            length = self.layout.chunk_rows * self.row_bytes + start - aligned
            self._maps[place].madvise(mmap.MADV_WILLNEED, aligned, length)

    def check_chunk(self, chunk: int) -> None:
        """Compare one chunk with its checksum."""
        place, start = self._place(chunk)
        end = start + self.layout.chunk_rows * self.row_bytes
        file, shard = self._files[place], self._shards[place]
        if checksum_bytes(file[start:end]) != file[end : end + CHECKSUM_BYTES].tobytes():
            where = str(shard.root / shard.key)
            raise StoreDamaged(f"chunk {chunk} of {where!r} does not match its checksum. {shard.advice}")

    def check_sizes(self) -> None:
        """Refuse mapped files that were cut short: touching what is gone would end the process by SIGBUS."""
        for mapped, shard in zip(self._maps, self._shards, strict=False):
            if (found := mapped.size()) < shard.size:
                raise StoreDamaged(
                    f"{str(shard.root / shard.key)!r} was changed while it was read: it has {found} bytes, "
                    f"expected {shard.size}. {shard.advice}"
                )

    def check_unchanged(self) -> None:
        """Refuse mapped files that were changed in place; their times say which to compare again."""
        self.check_sizes()
        # A resident component has no stamps: nobody else can change it.
        for shard, content, stamp in zip(self._shards, self._files, self._stamps, strict=False):
            path = shard.root / shard.key
            try:
                found = _Stamp.of(path.stat())
            except FileNotFoundError:
                continue
            # A file that was replaced as a whole is another one: the map still shows the old.
            is_touched = found != stamp and found.inode == stamp.inode
            if is_touched and file_checksum(content, self.layout) != shard.crc:
                raise StoreDamaged(
                    f"{str(path)!r} was changed while it was read, and no longer matches its checksum: rows "
                    f"read since it was opened may be wrong. {shard.advice}"
                )

    def _place(self, chunk: int) -> tuple[int, int]:
        """Shard of a chunk, and where in its file the chunk starts."""
        place = chunk * self.layout.chunk_rows // self.layout.shard_rows
        return place, int(self.addresses[chunk]) - self._files[place].ctypes.data

    def _content(self, shard: ShardFile, *, resident: bool) -> NDArray[np.uint8]:
        path = shard.root / shard.key
        try:
            with naming(path), os.fdopen(open_regular(path), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size != shard.size:
                    raise StoreDamaged(
                        f"{str(path)!r} has {status.st_size} bytes, expected {shard.size}. {shard.advice}"
                    )
                if resident:
                    return np.fromfile(file, dtype=np.uint8)
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                self._stamps.append(_Stamp.of(status))
                return np.frombuffer(self._maps[-1], dtype=np.uint8)
        except FileNotFoundError as error:
            raise StoreDamaged(f"{str(path)!r} is missing. {shard.advice}") from error
