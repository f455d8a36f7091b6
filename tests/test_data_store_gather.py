"""The compiled copy of rows equals numpy's, for rows shorter and longer than what is prefetched."""

from __future__ import annotations

import numpy as np
import pytest

from coursepack.data.store.jit_gather import ALIGNMENT, BYTES_AHEAD, ROWS_AHEAD, gather_rows

ROWS, CHUNK_ROWS = 50, 8


@pytest.mark.parametrize("count", [0, 1, ROWS_AHEAD, ROWS_AHEAD + 1, 200])
@pytest.mark.parametrize("widths", [(1,), (19, 8), (64, 3 * BYTES_AHEAD), (BYTES_AHEAD - 1, 0, 2000)])
def test_rows_of_every_width_are_copied(widths, count):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (ROWS, width), dtype=np.uint8) for width in widths]
    chunks = [
        part.ctypes.data + start * part.shape[1] for part in parts for start in range(0, ROWS, CHUNK_ROWS)
    ]
    per_part = len(chunks) // len(parts)
    table = np.array([(place * per_part, CHUNK_ROWS, width) for place, width in enumerate(widths)], np.int64)
    samples = rng.integers(0, ROWS, count)
    sizes = [-(-count * width // ALIGNMENT) * ALIGNMENT for width in widths]
    out = np.zeros(sum(sizes), np.uint8)
    assert gather_rows(np.array(chunks), table, ROWS, samples, out.ctypes.data) == -1
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        found = out[start : start + count * part.shape[1]].reshape(count, part.shape[1])
        assert np.array_equal(found, part[samples])
        start += size


@pytest.mark.parametrize("sample", [-1, ROWS])
def test_nothing_is_copied_for_a_sample_out_of_range(sample):
    part, out = np.ones((ROWS, 4), np.uint8), np.zeros(4 * 64, np.uint8)
    samples = np.array([0, 1, sample, 2])
    table = np.array([(0, ROWS, 4)], np.int64)
    assert gather_rows(np.array([part.ctypes.data]), table, ROWS, samples, out.ctypes.data) == 2
    assert not out.any()
