"""Byte layout of a shard file: chunks of raw rows, each followed by its crc32c, then an index.

    chunk 0 | crc32c | chunk 1 | crc32c | ... | (offset, bytes) per chunk, uint64 | crc32c of the index

This is Zarr v3's `sharding_indexed` over `[bytes, crc32c]`, so a chunk is a table of rows at a known offset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from coursepack.errors import StoreDamaged

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from coursepack.data.store.layout import ArrayLayout

Piece = bytes | NDArray[np.uint8]
"""Consecutive bytes of a file."""

CHECKSUM_BYTES = 4
ABSENT = (1 << 64) - 1
"""Offset and size in the index for a chunk entirely beyond the end of the array."""


def shard_pieces(rows: NDArray[Any], layout: ArrayLayout) -> list[Piece]:
    """Return the contents of one shard file, as pieces to be written in order.

    Args:
        rows: rows `(n, *row_shape)` with n equal to `layout.shard_rows`, or less in the last shard of a view.
            The last chunk is padded with the array's fill value.
        layout: layout of the array.
    """
    chunk_rows = layout.chunk_rows
    stored = np.ascontiguousarray(rows, dtype=np.dtype(layout.dtype).newbyteorder("<"))
    index = np.full((layout.shard_rows // chunk_rows, 2), ABSENT, dtype="<u8")
    pieces: list[Piece] = []
    offset = 0
    for place, start in enumerate(range(0, len(stored), chunk_rows)):
        chunk = stored[start : start + chunk_rows]
        if len(chunk) < chunk_rows:
            fill = np.nan if chunk.dtype.kind == "f" else 0
            padding = np.full((chunk_rows - len(chunk), *chunk.shape[1:]), fill, dtype=chunk.dtype)
            chunk = np.concatenate([chunk, padding])
        data = chunk.reshape(-1).view(np.uint8)
        index[place] = offset, len(data) + CHECKSUM_BYTES
        offset += len(data) + CHECKSUM_BYTES
        pieces += [data, checksum_bytes(data)]
    footer = index.tobytes()
    return [*pieces, footer, checksum_bytes(footer)]


def shard_size(rows: int, layout: ArrayLayout) -> int:
    """Return the size in bytes of a shard file with this many rows."""
    chunks = -(-rows // layout.chunk_rows)
    return chunks * _chunk_bytes(layout) + _footer_bytes(layout)


def rows_size(rows: int, layout: ArrayLayout) -> int:
    """Return the total size in bytes of the shard files of this many rows, starting at a shard boundary."""
    full, rest = divmod(rows, layout.shard_rows)
    return full * shard_size(layout.shard_rows, layout) + (shard_size(rest, layout) if rest else 0)


def chunk_offsets(file: NDArray[np.uint8], rows: int, layout: ArrayLayout, where: str) -> NDArray[np.int64]:
    """Return the byte offset of each chunk in a shard file.

    Args:
        file: bytes of the file, usually a memory map.
        rows: number of rows of the view in this shard.
        layout: layout of the array.
        where: key of the file, for error messages.

    Raises:
        StoreDamaged: the index is damaged or does not match the layout and the file size.
    """
    count = layout.shard_rows // layout.chunk_rows
    footer_bytes = _footer_bytes(layout)
    if len(file) < footer_bytes:
        raise StoreDamaged(f"{where!r} has {len(file)} bytes, too few for its index of {count} chunks")
    footer = file[len(file) - footer_bytes :]
    if checksum_bytes(footer[:-CHECKSUM_BYTES].tobytes()) != footer[-CHECKSUM_BYTES:].tobytes():
        raise StoreDamaged(f"the index of {where!r} does not match its checksum")
    index = footer[:-CHECKSUM_BYTES].copy().view("<u8").reshape(count, 2)[: -(-rows // layout.chunk_rows)]
    offsets, sizes = index[:, 0], index[:, 1]
    expected = _chunk_bytes(layout)
    last = len(file) - footer_bytes
    if bool((sizes != expected).any() or last < expected or (offsets > last - expected).any()):
        raise StoreDamaged(f"the index of {where!r} points outside its chunks of {expected} bytes")
    return offsets.astype(np.int64)


def checksum(data: bytes | NDArray[np.uint8]) -> int:
    """Return the crc32c of the data."""
    return int(google_crc32c.value(data))


def shard_checksum(pieces: list[Piece]) -> int:
    """Return the crc32c of the checksums in a shard, which identifies its content.

    A crc32c of the whole file would be the same for all shards of an array, since the crc32c of data followed
    by its own crc32c does not depend on the data.
    """
    return checksum(b"".join(map(bytes, pieces[1::2])))


class FileCheck:
    """Verification of a shard file, during the read or after it."""

    def __init__(self, layout: ArrayLayout) -> None:
        self._layout = layout
        self._intact: set[int] = set()

    @property
    def step(self) -> int:
        """Size in bytes of a chunk with its checksum."""
        return _chunk_bytes(self._layout)

    def check(self, content: NDArray[np.uint8], start: int, stop: int) -> None:
        """Verify the whole chunks in bytes `start` to `stop`, and remember those that are intact."""
        stop = min(stop, len(content) - _footer_bytes(self._layout))
        for first in range(start, stop - self.step + 1, self.step):
            if _is_intact(content, first, first + self.step - CHECKSUM_BYTES):
                self._intact.add(first)

    def checksum(self, content: NDArray[np.uint8]) -> int | None:
        """Verify the rest of a file; return `shard_checksum`, or None if data does not match its checksum."""
        for start, stop in _checked_spans(len(content), self._layout):
            if start not in self._intact and not _is_intact(content, start, stop):
                return None
        return stored_checksum(content, self._layout)


def file_checksum(file: NDArray[np.uint8], layout: ArrayLayout) -> int | None:
    """Verify a shard file and return its `shard_checksum`, or None if data does not match its checksum."""
    return FileCheck(layout).checksum(file)


def stored_checksum(file: NDArray[np.uint8], layout: ArrayLayout) -> int:
    """Return `shard_checksum` from the checksums stored in a file, without verifying or reading the data."""
    spans = _checked_spans(len(file), layout)
    return checksum(b"".join(file[stop : stop + CHECKSUM_BYTES].tobytes() for _, stop in spans))


def checksum_bytes(data: bytes | NDArray[np.uint8]) -> bytes:
    """Return the crc32c of the data as stored: four bytes, little-endian."""
    return checksum(data).to_bytes(CHECKSUM_BYTES, "little")


def _checked_spans(size: int, layout: ArrayLayout) -> Iterator[tuple[int, int]]:
    """Yield start and stop of every span followed by a checksum: the chunks, then the index."""
    footer, step = size - _footer_bytes(layout), _chunk_bytes(layout)
    for start in range(0, footer, step):
        yield start, min(start + step, footer) - CHECKSUM_BYTES
    yield footer, size - CHECKSUM_BYTES


def _is_intact(file: NDArray[np.uint8], start: int, stop: int) -> bool:
    return checksum_bytes(file[start:stop]) == file[stop : stop + CHECKSUM_BYTES].tobytes()


def _chunk_bytes(layout: ArrayLayout) -> int:
    """Return the size in bytes of a chunk with its checksum."""
    return layout.chunk_rows * layout.row_bytes + CHECKSUM_BYTES


def _footer_bytes(layout: ArrayLayout) -> int:
    return 16 * (layout.shard_rows // layout.chunk_rows) + CHECKSUM_BYTES
