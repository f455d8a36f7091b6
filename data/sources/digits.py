"""The handwritten digits that ship with scikit-learn: a small real data set available on every machine."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from coursepack.data.randomness import Purpose, shuffled
from coursepack.data.sources.base import InMemory
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from coursepack.data.sources.base import Source, Spec

TEST_SHARE = 5
"""One in this many samples of each class is a test sample."""


def digits(spec: Spec, root: Path | None) -> Source:
    """Open scikit-learn's 1797 digits of 8 x 8 (UCI, Alpaydin and Kaynak 1998): 1442 train, 355 test.

    The split is fixed: a seeded fifth of each class is for testing. The sixteen gray levels are scaled to
    0..255.
    """
    if root is not None:
        raise RecipeError("source 'digits' ships with scikit-learn and has no files: leave --root out")
    images, labels, test = _load()
    chosen = test if spec.split == "test" else ~test
    return InMemory(str(spec), images[chosen], labels[chosen], tuple(str(digit) for digit in range(10)))


@cache
def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Return all images, labels, and which are for testing; parsing scikit-learn's text takes a while."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = shuffled(np.flatnonzero(labels == digit), seed=0, view=0, purpose=Purpose.SPLIT)
        test[members[: len(members) // TEST_SHARE]] = True
    return images, labels, test
