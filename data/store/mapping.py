"""Opening one view of one stored array: every shard checked, every chunk's address known."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from coursepack.data.store.shards import CHECKSUM_BYTES, checksum, checksum_bytes, chunk_offsets
from coursepack.errors import StoreDamaged

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


class OpenView:
    """Rows of one view, wherever they are: in the files (mapped), or in memory (resident)."""

    def __init__(
        self, layout: ArrayLayout, rows: int, shards: list[ShardFile], *, resident: bool, check: Check
    ) -> None:
        """Open and check all shards.

        Args:
            layout: the array's.
            rows: rows of the view.
            shards: its files in order.
            resident: read the files into memory instead of mapping them.
            check: what to compare with its checksum: whole files now; each chunk before its first row is
                served, which suits files too large to read through first; or nothing, for files that this
                process has checked before.

        Raises:
            StoreDamaged: a file is missing, has another size, or does not match its checksum.
        """
        self.layout = layout
        self._keys = [shard.key for shard in shards]
        self._maps: list[mmap.mmap] = []
        self._files: list[NDArray[np.uint8]] = []
        addresses = []
        for place, shard in enumerate(shards):
            content = self._content(shard, resident=resident)
            if check == "files" and checksum(content) != shard.crc:
                raise StoreDamaged(
                    f"the content of {shard.key!r} in {str(shard.root)!r} does not match its checksum. "
                    f"{_advice(shard)}"
                )
            held = min(layout.shard_rows, rows - place * layout.shard_rows)
            addresses.append(chunk_offsets(content, held, layout, shard.key) + content.ctypes.data)
            self._files.append(content)
        self._chunks = np.concatenate(addresses)
        self._checked = np.full(len(self._chunks), check != "chunks")

    def gather(self, samples: Samples) -> NDArray[np.uint8]:
        """Raw rows `(n, row_bytes)` of samples that are known to be inside.

        Raises:
            StoreDamaged: a chunk that is served for the first time does not match its checksum.
        """
        from coursepack.data.store.jit_gather import gather_rows

        if not self._checked.all():
            self._check_chunks(np.unique(samples // self.layout.chunk_rows))
        out = np.empty((len(samples), self.layout.row_bytes), dtype=np.uint8)
        gather_rows(self._chunks, self.layout.chunk_rows, self.layout.row_bytes, samples, out.ctypes.data)
        return out

    def will_need(self, samples: Samples) -> None:
        """Ask the system to read the chunks of these samples in the background."""
        for chunk in np.unique(samples // self.layout.chunk_rows):
            place = int(chunk) * self.layout.chunk_rows // self.layout.shard_rows
            if place < len(self._maps):
                start = int(self._chunks[chunk]) - self._files[place].ctypes.data
                aligned = start - start % PAGE
                length = self.layout.chunk_rows * self.layout.row_bytes + start - aligned
                self._maps[place].madvise(mmap.MADV_WILLNEED, aligned, length)

    def _check_chunks(self, chunks: NDArray[np.int64]) -> None:
        size = self.layout.chunk_rows * self.layout.row_bytes
        for chunk in chunks[~self._checked[chunks]]:
            place = int(chunk) * self.layout.chunk_rows // self.layout.shard_rows
            file = self._files[place]
            start = int(self._chunks[chunk]) - file.ctypes.data
            data = file[start : start + size].tobytes()
            if checksum_bytes(data) != file[start + size : start + size + CHECKSUM_BYTES].tobytes():
                raise StoreDamaged(
                    f"chunk {int(chunk)} of {self._keys[place]!r} does not match its checksum. "
                    "Run `precompute verify` on the store."
                )
            self._checked[chunk] = True

    def _content(self, shard: ShardFile, *, resident: bool) -> NDArray[np.uint8]:
        path = shard.root / shard.key
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != shard.size:
                    raise StoreDamaged(
                        f"{str(path)!r} has {found} bytes, expected {shard.size}. {_advice(shard)}"
                    )
                if resident:
                    return np.fromfile(file, dtype=np.uint8)
                self._maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
                return np.frombuffer(self._maps[-1], dtype=np.uint8)
        except FileNotFoundError as error:
            raise StoreDamaged(f"{str(path)!r} is missing. {_advice(shard)}") from error


def _advice(shard: ShardFile) -> str:
    return f"Run `precompute verify --store {shard.root}`."
