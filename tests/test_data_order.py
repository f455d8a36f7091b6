"""Random orders of many samples are those of a stable sort, however they are sorted."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from coursepack.data import randomness
from coursepack.data.batches import Window, epoch_order
from coursepack.data.randomness import Purpose, first_shuffled, random_words, shuffled
from coursepack.data.sources.base import InMemory
from coursepack.data.sources.splits import hold_out, parse_hold_out, subset


def stable(samples, view, purpose, seed=3):
    words = random_words(seed, samples, view, purpose)
    keys = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1]
    return samples[np.argsort(keys, kind="stable")]


def source_of_classes():
    """Return a source of 3000 samples in uneven classes, of which some have none."""
    labels = np.random.default_rng(2).integers(0, 30, 3000) ** 2
    return InMemory("uneven", np.zeros((3000, 1, 1, 1), np.uint8), labels, tuple(map(str, range(900))))


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


@pytest.mark.parametrize("count", [1, 2, 70_000, 200_001])
def test_many_samples_are_in_the_order_of_a_stable_sort(count):
    samples = np.arange(count) * 3
    assert np.array_equal(shuffled(samples, 3, 1, Purpose.ORDER), stable(samples, 1, Purpose.ORDER))


@pytest.mark.parametrize("few", [0, 7])
@pytest.mark.parametrize("count", [1, 64, 4999, 5000, 6000])
def test_the_first_samples_are_those_of_the_whole_order(monkeypatch, few, count):
    samples = np.arange(5000)[::-1]
    if few:
        drawn = np.random.default_rng(1).integers(0, few, (5000, 4)).astype(np.uint32)
        monkeypatch.setattr(randomness, "random_words", lambda *_: drawn)
    expected = shuffled(samples, 3, 1, Purpose.ORDER)[:count]
    assert np.array_equal(first_shuffled(samples, count, 3, 1, Purpose.ORDER), expected)


@pytest.mark.parametrize("share", ["0.1", "0.25"])
def test_a_hold_out_takes_the_first_of_every_class(share):
    source = source_of_classes()
    held = parse_hold_out(f"train+{share}")[1]
    expected, seen = [], 0
    for label in np.unique(source.labels):
        members = stable(np.flatnonzero(source.labels == label), 0, Purpose.SPLIT, seed=0)
        before, seen = seen, seen + len(members)
        upto, start = (int(held.share * rows + Fraction(1, 2)) for rows in (seen, before))
        expected += members[: upto - start].tolist()
    assert np.array_equal(hold_out(source, held).picked, sorted(expected))


@pytest.mark.parametrize("limit", [1, 40, 333, 2999])
def test_a_limit_takes_the_first_of_every_class_in_turn(limit):
    source = source_of_classes()
    order = stable(np.arange(3000), 0, Purpose.SUBSET, seed=0)
    seen, ranks = Counter(), []
    for label in source.labels[order].tolist():
        ranks.append(seen[label])
        seen[label] += 1
    expected = sorted(order[np.argsort(ranks, kind="stable")[:limit]])
    assert np.array_equal(subset(source, limit), expected)


@pytest.mark.parametrize("rows", [3, 64, 9000])
def test_windows_are_in_the_order_of_their_chunks(rows):
    samples, window = np.arange(0, 8000, 2), Window(rows, 4)
    order = stable(samples, 5, Purpose.ORDER)
    chunks = order // rows
    distinct = stable(np.unique(chunks), 5, Purpose.CHUNK_ORDER)
    rank = {int(chunk): index // 4 for index, chunk in enumerate(distinct)}
    expected = order[np.argsort([rank[int(chunk)] for chunk in chunks], kind="stable")]
    assert np.array_equal(epoch_order(samples, seed=3, epoch=5, window=window), expected)
