"""The compiled copy of rows equals numpy's, for rows shorter and longer than what is prefetched."""

from __future__ import annotations

import numpy as np
import pytest

from coursepack.data.store.gather import ALIGNMENT, PARALLEL_FROM, copy_rows
from coursepack.data.store.jit_gather import BYTES_AHEAD, ROWS_AHEAD

ROWS, CHUNK_ROWS = 50, 8


@pytest.mark.parametrize("count", [0, 1, ROWS_AHEAD, ROWS_AHEAD + 1, 200])
@pytest.mark.parametrize(
    "widths", [(1,), (19, 8), (64, 3 * BYTES_AHEAD), (BYTES_AHEAD - 1, 0, 2000), (2000,) * 4]
)  # in one thread and in two: see PARALLEL_FROM
def test_rows_of_every_width_are_copied(widths, count):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (ROWS, width), dtype=np.uint8) for width in widths]
    chunks = [part.ctypes.data + np.arange(0, ROWS, CHUNK_ROWS) * part.shape[1] for part in parts]
    samples = rng.integers(0, ROWS, count)
    sizes = [-(-count * width // ALIGNMENT) * ALIGNMENT for width in widths]
    out = np.zeros(sum(sizes), np.uint8)
    places = [(each.ctypes.data, CHUNK_ROWS, width) for each, width in zip(chunks, widths, strict=True)]
    assert copy_rows(np.array(places), ROWS, samples, out) == -1
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        found = out[start : start + count * part.shape[1]].reshape(count, part.shape[1])
        assert np.array_equal(found, part[samples])
        start += size


@pytest.mark.parametrize("sample", [-1, ROWS])
@pytest.mark.parametrize("width", [4, PARALLEL_FROM])
def test_nothing_is_copied_for_a_sample_out_of_range(sample, width):
    part = np.ones((ROWS, width), np.uint8)
    samples = np.array([0, 1, sample, 2, -5])
    out = np.zeros(-(-len(samples) * width // ALIGNMENT) * ALIGNMENT, np.uint8)
    first = np.array([part.ctypes.data])
    assert copy_rows(np.array([(first.ctypes.data, ROWS, width)]), ROWS, samples, out) == 2
    assert not out.any()
