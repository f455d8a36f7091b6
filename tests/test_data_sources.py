"""Sources: the digits that never change, subsets of them, and names that do not exist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import random_source
from sklearn.datasets import load_digits

from coursepack.data import SOURCES, open_source
from coursepack.data.sources import evaluation_spec, subset
from coursepack.errors import RecipeError, UnknownName

# A change of these literals makes every store of the digits that was ever written unreadable.
FINGERPRINTS = {
    "digits:train": "2b5afb03b7a911992d6a2e76b4ad36d9a2dba0420398c62f91f6e1c3e93c157b",
    "digits:test": "30f9bc243de360c1972f668c00883408ebf87a92dc119a61988d868f4aeffea2",
}


@pytest.mark.parametrize("spec", FINGERPRINTS)
def test_fingerprints_of_the_digits_never_change(spec):
    assert open_source(spec).fingerprint == FINGERPRINTS[spec]


def test_facts_of_the_digits():
    train, test = open_source("digits"), open_source("digits:test")
    assert (train.name, test.name) == ("digits:train", "digits:test")
    assert (len(train.labels), len(test.labels)) == (1442, 355)
    for source in (train, test):
        assert source.class_names == tuple("0123456789")
        assert source.channels == 1
        assert source.sizes(np.array([3, 0])).tolist() == [[8, 8], [8, 8]]
        pixels = source.pixels(np.arange(len(source.labels)))
        assert pixels.shape == (len(source.labels), 8, 8, 1)
        assert pixels.dtype == np.uint8
        assert (pixels.min(), pixels.max()) == (0, 255)
        assert source.labels.dtype == np.int64


def test_train_and_test_divide_the_digits():
    # Two pairs of the 1797 images are equal, so samples are matched by multiplicity, with their labels.
    bunch = load_digits()
    images = np.floor(bunch.images * 255 / 16 + 0.5).astype(np.uint8).reshape(-1, 64)
    whole = sorted((int(label), image.tobytes()) for label, image in zip(bunch.target, images, strict=True))
    parts = []
    for spec in FINGERPRINTS:
        source = open_source(spec)
        pixels = source.pixels(np.arange(len(source.labels)))
        parts += [(int(label), image.tobytes()) for label, image in zip(source.labels, pixels, strict=True)]
    assert sorted(parts) == whole


def test_a_fifth_of_every_class_is_for_testing():
    train, test = (np.bincount(open_source(spec).labels, minlength=10) for spec in FINGERPRINTS)
    assert np.array_equal(test, (train + test) // 5)


def test_pixels_come_in_the_order_asked_for():
    source = open_source("digits")
    chosen = np.array([7, 3, 7, 1441])
    assert np.array_equal(source.pixels(chosen), source.pixels(np.arange(1442))[chosen])


@pytest.mark.parametrize(
    "change",
    [
        {"name": "random:test"},
        {"class_names": ("x", "y", "z")},
        {"labels": np.array([0, 1, 2, 1])},
        {"images": np.arange(16, dtype=np.uint8).reshape(4, 2, 2, 1)},
        {"images": np.zeros((4, 1, 4, 1), dtype=np.uint8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_covers_everything(change):
    names = ("a", "b", "c")
    source = replace(
        random_source(4),
        images=np.zeros((4, 2, 2, 1), np.uint8),
        labels=np.array([0, 1, 2, 0]),
        class_names=names,
    )
    assert replace(source).fingerprint == source.fingerprint
    assert replace(source, **change).fingerprint != source.fingerprint


@pytest.mark.parametrize("limit", [1, 10, 64, 300, 1000])
def test_subset_is_even_over_classes_and_the_same_each_time(limit):
    source = open_source("digits")
    chosen = subset(source, limit)
    counts = np.bincount(source.labels[chosen], minlength=10)
    assert counts.max() - counts.min() <= 1
    assert len(np.unique(chosen)) == limit
    assert np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, subset(open_source("digits"), limit))
    assert set(chosen) <= set(subset(source, limit + 100))


def test_subset_of_uneven_classes_takes_what_there_is():
    source = replace(random_source(20), labels=np.array([0] * 3 + [1] * 17))
    assert np.bincount(source.labels[subset(source, 12)]).tolist() == [3, 9]


def test_subset_is_not_the_first_samples():
    assert not np.array_equal(subset(open_source("digits"), 100), np.arange(100))


@pytest.mark.parametrize("limit", [None, 1442])
def test_whole_source(limit):
    assert np.array_equal(subset(open_source("digits"), limit), np.arange(1442))


def test_limit_beyond_the_source_is_refused():
    text = "limit is 1443, but source 'digits:train' has 1442 samples"
    with pytest.raises(RecipeError, match=text):
        subset(open_source("digits"), 1443)


@pytest.mark.parametrize("open_it", [open_source, evaluation_spec])
def test_unknown_source_names_the_nearest(open_it):
    with pytest.raises(UnknownName, match=r"unknown source 'digit'\. Did you mean 'digits'\? Known: digits"):
        open_it("digit")


def test_unknown_split_names_the_nearest():
    text = r"unknown split of source 'digits' 'tset'\. Did you mean 'test'\? Known: train, test\."
    with pytest.raises(UnknownName, match=text):
        open_source("digits:tset")


def test_digits_have_no_folder():
    with pytest.raises(RecipeError, match="has no files: leave --root out"):
        open_source("digits", Path("somewhere"))


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_evaluated_on_a_split_that_it_has(name):
    spec = "python:module:factory" if name == "python" else name
    for split in SOURCES[name].splits:
        found, _, evaluation = evaluation_spec(f"{spec}:{split}").rpartition(":")
        assert found == spec
        assert evaluation in SOURCES[name].splits
