"""Compiled copying of rows from memory-mapped chunks. Imported on first use, since importing numba is slow.

The function reads and writes raw addresses: `mapping` checks every file, and sample indices are checked here.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba.core import cgutils

from coursepack.data.store.gather import ALIGNMENT
from coursepack.kernels.cpu.jit_base import SOURCES, carray, compiled, int64, intrinsic, jit, njit, types
from coursepack.kernels.cpu.jit_math import fetch_add, load_int64, prefetch_lines, store_int64

ROWS_AHEAD, BYTES_AHEAD = 16, 8192
"""Number of rows, and of bytes in them, that are prefetched during the copy of a row. Rows are far apart, and
without prefetching each copy waits for page tables and memory anew."""
FIELDS = 8


@intrinsic
def _copy_bytes(typingctx: Any, target: Any, origin: Any, count: Any) -> Any:
    """Copy `count` bytes between two addresses with memcpy."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = context.get_value_type(types.voidptr)
        target, origin = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, target, origin, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit
def _first_outside(samples: int, count: int, rows: int) -> int:
    """Return the index of the first sample that is not one of the rows, or -1."""
    for i in range(count):
        sample = load_int64(samples, i)
        if sample < 0 or sample >= rows:
            return i
    return -1


@njit(forceinline=True)
def _origin(chunks: int, chunk_rows: int, row_bytes: int, sample: int) -> int:
    """Return the address of a sample's row."""
    chunk = sample // chunk_rows
    return load_int64(chunks, chunk) + (sample - chunk * chunk_rows) * row_bytes


@njit
def _copy_rows(
    chunks: int, chunk_rows: int, row_bytes: int, samples: int, start: int, stop: int, target: int
) -> None:
    """Copy the rows of samples `start` to `stop` of one component. The first sample's row is at `target`."""
    ahead = min(ROWS_AHEAD, max(1, BYTES_AHEAD // max(1, row_bytes)))
    fetched = min(row_bytes, BYTES_AHEAD)
    for i in range(start, stop):
        if i + ahead < stop:
            later = _origin(chunks, chunk_rows, row_bytes, load_int64(samples, i + ahead))
            prefetch_lines(later, fetched)
        origin = _origin(chunks, chunk_rows, row_bytes, load_int64(samples, i))
        _copy_bytes(target + i * row_bytes, origin, row_bytes)


@njit(forceinline=True)
def _padded(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@jit
def copy_serially(table: np.ndarray, rows: int, samples: np.ndarray, out: np.ndarray) -> int:
    """Copy all rows in the calling thread; see `gather.copy_rows`."""
    places, target, count = int64(samples.ctypes.data), int64(out.ctypes.data), len(samples)
    found = _first_outside(places, count, rows)
    if found < 0:
        for chunks, chunk_rows, row_bytes in table:
            _copy_rows(chunks, chunk_rows, row_bytes, places, 0, count, target)
            target += _padded(count * row_bytes)
    return found


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Copy pieces of components until none is left; `gather.copy_rows` packs the fields of `data`.

        Every thread runs this. Nothing is copied if a sample is out of range: the second number of the state
        receives its index + 1. The first is the number of pieces taken.
        """
        table, components, rows, count, piece, samples, target, state = carray(data, (FIELDS,), np.int64)
        found = _first_outside(samples, count, rows)
        if found >= 0:
            store_int64(state, 1, found + 1)
            return
        pieces = (count + piece - 1) // piece
        taken, component = fetch_add(state, 1), 0
        while taken < pieces * components and sources != 0:  # always: a part of numba's key of compiled code
            while component < taken // pieces:
                target += _padded(count * load_int64(table, 3 * component + 2))
                component += 1
            start = taken % pieces * piece
            chunks, chunk_rows = load_int64(table, 3 * component), load_int64(table, 3 * component + 1)
            row_bytes = load_int64(table, 3 * component + 2)
            _copy_rows(chunks, chunk_rows, row_bytes, samples, start, min(start + piece, count), target)
            taken = fetch_add(state, 1)

    return run


@functools.cache
def compiled_pieces() -> int:
    """Return the address of the compiled function that copies in threads."""
    return int(_entry(SOURCES).address)
