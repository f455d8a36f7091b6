"""Compiled copying of rows from memory-mapped chunks. Imported on first use, since importing numba is slow.

The functions read and write raw addresses: `mapping` checks every file, and sample indices are checked here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from coursepack.kernels.cpu.jit_math import prefetch

ALIGNMENT = 64
"""Alignment in bytes of the first row of every component."""
ROWS_AHEAD, BYTES_AHEAD = 16, 8192
"""Number of rows, and of bytes in them, that are prefetched during the copy of a row. Rows are far apart, and
without prefetching each copy waits for page tables and memory anew."""


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
    origins = np.empty(len(samples), np.int64)
    for component in range(len(table)):
        first, chunk_rows, row_bytes = table[component, 0], table[component, 1], table[component, 2]
        for i in range(len(samples)):
            chunk = samples[i] // chunk_rows
            origins[i] = chunks[first + chunk] + (samples[i] - chunk * chunk_rows) * row_bytes
        ahead = min(ROWS_AHEAD, max(1, BYTES_AHEAD // max(1, row_bytes)))
        fetched = min(row_bytes, BYTES_AHEAD)
        for i in range(len(samples)):
            if i + ahead < len(samples):
                for start in range(0, fetched, 64):
                    prefetch(origins[i + ahead] + start)
            _copy_bytes(target + i * row_bytes, origins[i], row_bytes)
        size = len(samples) * row_bytes
        target += (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return -1
