"""Random numbers as a pure function of (seed, sample, view, purpose): Philox4x32-10, counter-based.

There is no state, so a draw does not depend on batch size, order, workers, machine or interruption. Nothing
in coursepack that concerns data uses any other generator (docs/decisions/randomness.md). What is drawn is
computed from random words by integers, and by the functions of `data.exact`, which give the same bits
everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]
Words = NDArray[np.uint32]

STREAM_BITS = 16
"""Purposes stand in the lower bits of a counter's last word, the number of a draw in the upper ones."""


class Purpose(IntEnum):
    """What a draw is for. Values are part of every fingerprint: never change one, only add."""

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
    VIEW = 16
    """The first op of a view recipe; op number i uses `VIEW + i`."""


def random_words(seed: int, samples: Samples, view: int, purpose: int, streams: int = 1) -> Words:
    """Four random 32-bit words per sample and stream, `(N, 4 streams)` uint32.

    Args:
        seed: 0 to 2**64 - 1; the key.
        samples: `(N,)` sample indices, 0 to 2**63 - 1.
        view: view index (or epoch), 0 to 2**32 - 1.
        purpose: a `Purpose`, or `Purpose.VIEW` plus an op's place.
        streams: how many draws of four words, numbered from the one in the purpose's upper bits on.

    Raises:
        ValueError: a seed, view or sample out of range.
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
    """Random words for one purpose: everything but how many are needed."""

    seed: int
    samples: Samples
    view: int
    purpose: int

    def words(self, stream: int = 0, count: int = 1) -> Words:
        """Four words per sample of `count` streams `(N, 4 count)`; every stream has its own."""
        purpose = self.purpose + (stream << STREAM_BITS)
        return random_words(self.seed, self.samples, self.view, purpose, count)

    def only(self, rows: NDArray[np.int64]) -> Draws:
        """The same draws for some of the samples."""
        return Draws(self.seed, self.samples[rows], self.view, self.purpose)


def below(words: Words, bound: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Integers 0 to bound - 1 from random words, by multiplication (bias at most bound / 2**32)."""
    scale = np.asarray(bound).astype(np.uint64)
    return ((words.astype(np.uint64) * scale) >> np.uint64(32)).astype(np.int64)


def between(words: Words, low: int, high: int) -> NDArray[np.int64]:
    """Integers low to high, both included, each as likely."""
    return low + below(words, high - low + 1)


def chance(words: Words, probability: float) -> NDArray[np.bool_]:
    """True with the given probability."""
    return words.astype(np.uint64) < np.uint64(round(probability * 2**32))


def shuffled(samples: Samples, seed: int, view: int, purpose: Purpose) -> Samples:
    """The samples in a random order that depends on each sample's own draw, so on nothing else."""
    words = random_words(seed, samples, view, purpose)
    keys = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1]
    return samples[np.argsort(keys, kind="stable")]
