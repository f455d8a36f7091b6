"""Random numbers as a pure function of (seed, sample, view, purpose): Philox4x32-10, counter-based.

There is no state, so a draw does not depend on batch size, order, workers, machine or interruption. Nothing
in coursepack that concerns data uses any other generator (docs/decisions/randomness.md).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]


class Purpose(IntEnum):
    """What a draw is for. Values are part of every fingerprint: never change one, only add."""

    SPLIT = 1
    SUBSET = 2
    ORDER = 3
    CHUNK_ORDER = 4
    CONTENT = 8
    FAKE = 9
    VIEW = 16
    """The first op of a view recipe; op number i uses `VIEW + i`."""


def random_words(seed: int, samples: Samples, view: int, purpose: int) -> NDArray[np.uint32]:
    """Four random 32-bit words per sample, `(N, 4)` uint32.

    Args:
        seed: 0 to 2**64 - 1; the key.
        samples: `(N,)` sample indices, 0 to 2**64 - 1.
        view: view index (or epoch), 0 to 2**32 - 1.
        purpose: a `Purpose`, or `Purpose.VIEW` plus an op's place.

    Raises:
        ValueError: a seed, view or sample out of range.
    """
    from coursepack.data.jit_philox import philox_fill

    for name, value, bits in (("seed", seed, 64), ("view", view, 32), ("purpose", purpose, 32)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} is {value}, expected 0 to 2**{bits} - 1")
    if len(samples) and int(np.min(samples)) < 0:
        raise ValueError(f"samples hold {int(np.min(samples))}, expected no negative index")
    index = np.ascontiguousarray(samples, dtype=np.uint64)
    counters = np.empty((len(index), 4), dtype=np.uint32)
    counters[:, 0] = index & np.uint64(0xFFFFFFFF)
    counters[:, 1] = index >> np.uint64(32)
    counters[:, 2] = view
    counters[:, 3] = purpose
    words = np.empty_like(counters)
    philox_fill(counters, np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32), words)
    return words


def below(words: NDArray[np.uint32], bound: int) -> NDArray[np.int64]:
    """Integers 0 to bound - 1 from random words, by multiplication (bias at most bound / 2**32)."""
    return ((words.astype(np.uint64) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def shuffled(samples: Samples, seed: int, view: int, purpose: Purpose) -> Samples:
    """The samples in a random order that depends on each sample's own draw, so on nothing else."""
    words = random_words(seed, samples, view, purpose)
    keys = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1]
    return samples[np.argsort(keys, kind="stable")]
