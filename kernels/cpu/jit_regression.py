"""Squared errors of a student's features to stored rows, compiled. Imported at first use.

One pass over a sample decodes its row, writes the error and sums its squares. Maps of a student whose
channels are last in memory are compared with rows whose channels come first: the row is then decoded
transposed, into scratch memory that stays in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coursepack.kernels.cpu.jit_base import SOURCES, carray, compiled, float32, njit, types
from coursepack.kernels.cpu.jit_convert import from_half
from coursepack.kernels.cpu.jit_math import SUMS, fetch_add, load, load_uint16, store, wide_vectors
from coursepack.kernels.cpu.jit_softmax import BLOCK
from coursepack.kernels.cpu.layout import FLOAT16

FIELDS = 12
TILE = 16


@njit(fastmath=SUMS)
def decode_half(row: int, out: int, count: int) -> None:
    """Write a float16 row to `out` as float32."""
    wide_vectors()
    for d in range(count):
        store(out, d, from_half(load_uint16(row, d)))


@njit
def transpose(row: int, out: int, channels: int, positions: int) -> None:
    """Write a float32 row `(channels, positions)` to `out` as `(positions, channels)`."""
    wide_vectors()
    for first in range(0, channels, TILE):
        last = first + TILE if first + TILE < channels else channels
        for p in range(positions):
            for c in range(first, last):
                store(out, p * channels + c, load(row, c * positions + p))


@njit(fastmath=SUMS)
def errors(values: int, row: int, out: int, count: int) -> float:
    """Write `values - row` to `out` and return the sum of squares."""
    wide_vectors()
    total = 0.0
    for start in range(0, count, BLOCK):
        part = float32(0)
        for d in range(start, start + BLOCK if start + BLOCK < count else count):
            error = load(values, d) - load(row, d)
            store(out, d, error)
            part += error * error
        total += part
    return total


@njit
def one_sample(
    values: int,
    row: int,
    out: int,
    kind: int,
    channels: int,
    positions: int,
    scratch: int,
) -> float:
    """Compute the errors of one sample; returns the sum of squares."""
    count = channels * positions
    if kind == FLOAT16:
        decode_half(row, scratch, count)
        row, scratch = scratch, scratch + 4 * count
    if positions > 1:
        transpose(row, scratch, channels, positions)
        row = scratch
    return errors(values, row, out, count)


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Compute the errors of all samples; `regression.squared_error` packs the fields of `data`."""
        values, rows, out, sums, samples, kind, channels, positions, scratch, ticket, thread, chunk = carray(
            data, (FIELDS,), np.int64
        )
        count = channels * positions
        size = 2 if kind == FLOAT16 else 4
        own = scratch + 8 * count * fetch_add(thread, 1)
        start = fetch_add(ticket, 1) * chunk
        while start < samples and sources != 0:  # always: a part of the key that numba finds compiled code by
            for n in range(start, start + chunk if start + chunk < samples else samples):
                place = 4 * n * count
                total = one_sample(
                    values + place, rows + size * n * count, out + place, kind, channels, positions, own
                )
                store(sums, n, float32(total / count))
            start = fetch_add(ticket, 1) * chunk

    return run


run = _entry(SOURCES)
