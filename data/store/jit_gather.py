"""Compiled copying of rows from memory-mapped chunks. Imported on first use, since importing numba is slow.

The functions read and write raw addresses: `mapping` checks every file, and sample indices are checked here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

if TYPE_CHECKING:
    import numpy as np

ALIGNMENT = 64
"""Alignment in bytes of the first row of every component."""


@intrinsic
def _copy_bytes(typingctx: Any, target: Any, origin: Any, count: Any) -> Any:
    """Copy `count` bytes between two addresses with memcpy."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = context.get_value_type(types.voidptr)
        target, origin = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, target, origin, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(cache=True, nogil=True)
def gather_rows(chunks: np.ndarray, table: np.ndarray, rows: int, samples: np.ndarray, target: int) -> int:
    """Copy the samples' rows of several components, one component after another.

    Args:
        chunks: address of the first row of every chunk, int64, component after component.
        table: `(components, 3)` int64: index of the component's first chunk, chunk rows, bytes per row.
        rows: number of rows N; valid samples are 0 to N - 1.
        samples: sample indices `(n,)` int64.
        target: output address of the first component; each next one starts at a multiple of `ALIGNMENT`.

    Returns:
        -1, or the index of the first sample out of range, in which case nothing is copied.
    """
    for i in range(len(samples)):
        if samples[i] < 0 or samples[i] >= rows:
            return i
    for component in range(len(table)):
        first, chunk_rows, row_bytes = table[component, 0], table[component, 1], table[component, 2]
        for i in range(len(samples)):
            chunk = samples[i] // chunk_rows
            origin = chunks[first + chunk] + (samples[i] - chunk * chunk_rows) * row_bytes
            _copy_bytes(target + i * row_bytes, origin, row_bytes)
        size = len(samples) * row_bytes
        target += (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return -1
