"""Counter-based random numbers (Philox4x32-10), a pure function of (seed, sample, view, purpose).

The generator has no state: a draw does not depend on batch size, order, number of workers, machine or
interruptions. All randomness that concerns data comes from this module (docs/decisions/randomness.md). View
parameters are derived from the random words with integer arithmetic and with the functions of `data.exact`,
which give the same bits on every platform.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]
Words = NDArray[np.uint32]

STREAM_BITS = 16
"""Number of low bits of a counter's last word that hold the purpose; the high bits hold the stream."""
_PIECE = 1 << 16
"""Number of samples whose words are in memory at a time while keys are drawn."""


class Purpose(IntEnum):
    """Use of a random draw. Its value is part of the counter: never change one, only add new ones."""

    SPLIT = 1
    SUBSET = 2
    ORDER = 3
    CHUNK_ORDER = 4
    PROBE = 5
    MIXING = 6
    CONTENT = 8
    FAKE = 9
    TEACHER = 10
    STEP = 11
    VIEW_ORDER = 12
    NEGATIVES = 13
    MEMBER = 14
    PERMUTATION = 15
    VIEW = 16
    """Purpose of a view recipe's first op; op number i uses `VIEW + i`."""


def random_words(seed: int, samples: Samples, view: int, purpose: int, streams: int = 1) -> Words:
    """Return four random 32-bit words per sample and stream, `(N, 4 * streams)` uint32.

    Args:
        seed: key of the generator, 0 to 2**64 - 1.
        samples: `(N,)` sample indices, 0 to 2**63 - 1.
        view: view index (or epoch), 0 to 2**32 - 1.
        purpose: a `Purpose`, or `Purpose.VIEW` plus the index of an op; the high bits hold the first stream.
        streams: number of consecutive streams to draw, four words each.

    Raises:
        ValueError: a seed, view, purpose or sample index is out of range.
    """
    from coursepack.data.jit_philox import philox_draw

    if not (0 <= seed < 1 << 64 and 0 <= view < 1 << 32 and 0 <= purpose < 1 << 32):
        for name, value, bits in (("seed", seed, 64), ("view", view, 32), ("purpose", purpose, 32)):
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name} is {value}, expected 0 to 2**{bits} - 1")
    index = np.ascontiguousarray(samples, dtype=np.int64)
    words = np.empty((len(index), 4 * streams), dtype=np.uint32)
    smallest = philox_draw(index, np.uint64(seed), view, purpose, 1 << STREAM_BITS, words)
    if smallest < 0:
        raise ValueError(f"samples hold {smallest}, expected no negative index")
    return words


@dataclass(frozen=True)
class Draws:
    """Source of random words for a fixed seed, view and purpose, one row per sample."""

    seed: int
    samples: Samples
    view: int
    purpose: int

    def words(self, stream: int = 0, count: int = 1) -> Words:
        """Return the words of `count` consecutive streams from `stream` on, `(N, 4 * count)` uint32."""
        purpose = self.purpose + (stream << STREAM_BITS)
        return random_words(self.seed, self.samples, self.view, purpose, count)

    def select(self, rows: NDArray[np.int64]) -> Draws:
        """Return the draws of a subset of the samples, given by their row indices."""
        return Draws(self.seed, self.samples[rows], self.view, self.purpose)


def below(words: Words, bound: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Map random words to integers from 0 to bound - 1 by multiplication (bias at most bound / 2**32)."""
    scale = np.asarray(bound).astype(np.uint64)
    return ((words.astype(np.uint64) * scale) >> np.uint64(32)).astype(np.int64)


def between(words: Words, low: int, high: int) -> NDArray[np.int64]:
    """Map random words to uniformly distributed integers from low to high, both included."""
    return low + below(words, high - low + 1)


def chance(words: Words, probability: float) -> NDArray[np.bool_]:
    """Return True for each word with the given probability."""
    return words.astype(np.uint64) < np.uint64(round(probability * 2**32))


def shuffled(samples: Samples, seed: int, view: int, purpose: Purpose) -> Samples:
    """Return the samples in random order, sorted by a random key that depends on each sample alone."""
    return samples[_sorted_rows(_random_keys(samples, seed, view, purpose))]


def first_shuffled(samples: Samples, count: int, seed: int, view: int, purpose: Purpose) -> Samples:
    """Return the first `count` samples of `shuffled`, without sorting all of them."""
    if count >= len(samples):
        return shuffled(samples, seed, view, purpose)
    keys = _random_keys(samples, seed, view, purpose)
    rows = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
    return samples[rows[_sorted_rows(keys[rows])[:count]]]


def _random_keys(samples: Samples, seed: int, view: int, purpose: Purpose) -> NDArray[np.uint64]:
    """Return a random 64-bit key per sample `(N,)`."""
    keys = np.empty(len(samples), dtype=np.uint64)
    for start in range(0, len(samples), _PIECE):
        words = random_words(seed, samples[start : start + _PIECE], view, purpose)
        keys[start : start + _PIECE] = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1]
    return keys


def _sorted_rows(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the rows of random keys in ascending order, as a stable argsort does, in less time.

    Each row replaces the low bits of its key, and the numbers are sorted in place. The few keys that are
    equal in the other bits are sorted again.
    """
    bits = np.uint64(len(keys).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    packed = keys & ~low
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & low).view(np.int64)
    packed >>= bits
    tied = np.flatnonzero(packed[1:] == packed[:-1])
    if len(tied):
        places = np.union1d(tied, tied + 1)
        rows = order[places]
        order[places] = rows[np.argsort(keys[rows], kind="stable")]
    return order
