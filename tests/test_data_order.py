"""Random orders of many samples are those of a stable sort, however they are sorted."""

from __future__ import annotations

import numpy as np
import pytest

from coursepack.data import randomness
from coursepack.data.batches import Window, epoch_order
from coursepack.data.randomness import Purpose, random_words, shuffled


def stable(samples, view, purpose):
    words = random_words(3, samples, view, purpose)
    keys = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1]
    return samples[np.argsort(keys, kind="stable")]


@pytest.mark.parametrize("few", [0, 7])
def test_samples_with_equal_keys_keep_their_order(monkeypatch, few):
    samples = np.arange(5000)[::-1]
    if few:
        drawn = np.random.default_rng(0).integers(0, few, (5000, 4)).astype(np.uint32)
        drawn[:, 0] = 1
        monkeypatch.setattr(randomness, "random_words", lambda *_: drawn)
        expected = samples[np.argsort(drawn[:, 1], kind="stable")]
    else:
        expected = stable(samples, 1, Purpose.ORDER)
    assert np.array_equal(shuffled(samples, 3, 1, Purpose.ORDER), expected)


@pytest.mark.parametrize("rows", [3, 64, 9000])
def test_windows_are_in_the_order_of_their_chunks(rows):
    samples, window = np.arange(0, 8000, 2), Window(rows, 4)
    order = stable(samples, 5, Purpose.ORDER)
    chunks = order // rows
    distinct = stable(np.unique(chunks), 5, Purpose.CHUNK_ORDER)
    rank = {int(chunk): index // 4 for index, chunk in enumerate(distinct)}
    expected = order[np.argsort([rank[int(chunk)] for chunk in chunks], kind="stable")]
    assert np.array_equal(epoch_order(samples, seed=3, epoch=5, window=window), expected)
