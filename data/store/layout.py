"""Division of rows into blocks, shards and chunks.

A block is B consecutive rows of one view: the unit of work and of resuming. A shard is one file; shard rows
divide B. A chunk is the unit of checksum; chunk rows divide shard rows. All three divide N as evenly as
possible, which keeps the padding of the last chunk small.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.data.encodings import Component

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCK_ROWS = 65_536
"""Maximum rows of a block: the number of forward passes that a killed worker repeats at most."""
BLOCK_BYTES = 1 << 30
"""Maximum bytes of the widest array in one block."""
NARROW_BYTES = 32 << 20
"""Maximum bytes of the narrowest array in one block."""
SHARD_BYTES = 128 << 20
CHUNK_BYTES = 2 << 20
DTYPES = ("float32", "float16", "int64", "uint8", "uint16", "uint32")
"""Supported dtypes of stored arrays."""
MOST = 1 << 48
"""Maximum of any count and any size in bytes."""


@dataclass(frozen=True)
class ArrayLayout:
    """Row shape, dtype and sharding of one stored array `(V, N, *row_shape)`."""

    dtype: str
    row_shape: tuple[int, ...]
    shard_rows: int
    chunk_rows: int

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.row_shape)

    def shard_count(self, rows: int) -> int:
        """Return the number of shards of a view of `rows` rows."""
        return -(-rows // self.shard_rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain values for the manifest."""
        return asdict(self) | {"row_shape": list(self.row_shape)}


def whole(value: Any, least: int = 0) -> int:
    """Return an integer from JSON after checking that it is within `least` and `MOST`.

    Raises:
        ValueError: the value is not an integer or is out of range.
    """
    if type(value) is not int or not least <= value <= MOST:
        raise ValueError(f"{value!r:.40} is no whole number of at least {least}")
    return value


def layout_from_dict(values: Mapping[str, Any]) -> ArrayLayout:
    """Create a layout from the output of `to_dict`.

    Raises:
        ValueError, LookupError, TypeError: the values do not describe a layout.
    """
    if values["dtype"] not in DTYPES:
        raise ValueError(f"{values['dtype']!r:.40} is not among the types {DTYPES}")
    return ArrayLayout(
        dtype=values["dtype"],
        row_shape=tuple(whole(side, 1) for side in values["row_shape"]),
        shard_rows=whole(values["shard_rows"], 1),
        chunk_rows=whole(values["chunk_rows"], 1),
    )


def plan_block_rows(rows: int, row_bytes: list[int]) -> int:
    """Return the rows per block, computed once at the creation of a store from the widths of its rows.

    Args:
        rows: number of samples N.
        row_bytes: bytes per row of every array.
    """
    widest, narrowest = max(row_bytes), min(row_bytes)
    most = max(1, min(BLOCK_ROWS, BLOCK_BYTES // widest, max(1, NARROW_BYTES // narrowest)))
    blocks = -(-rows // most)
    chunks = _power_of_two(-(-min(most, rows) * widest // CHUNK_BYTES))
    return max(1, -(-rows // (blocks * chunks))) * chunks


def plan_array(component: Component, block_rows: int) -> ArrayLayout:
    """Return a layout of one component whose shards divide `block_rows` and whose chunks divide shards."""
    width = max(1, component.row_bytes)
    shard_rows = block_rows // _divisor_near(block_rows, -(-block_rows * width // SHARD_BYTES))
    chunk_rows = shard_rows // _divisor_near(shard_rows, -(-shard_rows * width // CHUNK_BYTES))
    return ArrayLayout(component.dtype, component.row_shape, shard_rows, chunk_rows)


def plan_table(rows: int, dtype: str, row_shape: tuple[int, ...]) -> ArrayLayout:
    """Return the layout of an array without views, `(rows, *row_shape)`, stored as a single shard."""
    row_bytes = Component(dtype, row_shape).row_bytes
    chunks = _power_of_two(-(-rows * row_bytes // CHUNK_BYTES))
    chunk_rows = -(-rows // chunks)
    return ArrayLayout(dtype, row_shape, chunk_rows * chunks, chunk_rows)


def block_count(rows: int, block_rows: int) -> int:
    """Return the number of blocks of one view."""
    return -(-rows // block_rows)


def shard_key(array: str, view: int, shard: int, layout: ArrayLayout) -> str:
    """Return the key of a shard file. All shards of an array are in the folder of that array."""
    return f"{array}/c.{view}.{shard}" + ".0" * len(layout.row_shape)


def table_key(name: str, layout: ArrayLayout) -> str:
    """Return the key of the only shard of an array without views."""
    return f"{name}/c.0" + ".0" * len(layout.row_shape)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _divisor_near(number: int, wanted: int) -> int:
    """Return a divisor of `number` from `wanted` to `4 * wanted`, else the largest one below `wanted`."""
    above = (d for d in range(wanted, min(4 * wanted, number) + 1) if number % d == 0)
    below = (d for d in range(min(wanted, number), 0, -1) if number % d == 0)
    return next(above, None) or next(below)
