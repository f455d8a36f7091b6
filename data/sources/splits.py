"""Parts of a split: hold-outs, which are sources of their own, and subsets, which belong to a run.

`train-0.1` is train without a tenth of every class and `train+0.1` is that tenth. Together they are train,
and the selection never changes. Both number their samples from 0, in the order of the full split.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from coursepack.canonical import fingerprint
from coursepack.data.randomness import Purpose, shuffled
from coursepack.data.sources.base import MAX_IN_MEMORY, fields_only, sha256_of
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.sources.base import Pixels, Source

_HOLD_OUT = re.compile(r"(?P<split>.*)(?P<sign>[+-])(?P<share>\d*\.\d+)", re.ASCII)


@dataclass(frozen=True)
class HoldOut:
    """Share of a split that is held out, or kept alone."""

    sign: str
    """`-` leaves the share out, `+` keeps the share alone."""
    share: Fraction
    text: str
    """The share as written in names, `0.1`."""

    def __str__(self) -> str:
        return f"{self.sign}{self.text}"


def parse_hold_out(split: str) -> tuple[str, HoldOut | None]:
    """Split a split's name into the name of the full split and the hold-out, if any.

    Raises:
        RecipeError: the share is not between 0 and 1.

    >>> split, hold_out = parse_hold_out("train-0.10")
    >>> split, str(hold_out)
    ('train', '-0.1')
    """
    found = _HOLD_OUT.fullmatch(split)
    if found is None:
        return split, None
    share = Decimal(found["share"])
    if not 0 < share < 1:
        name = found["split"] or "train"
        raise RecipeError(
            f"split {split!r} holds out a share of {found['share']}, expected one between 0 and 1, as in "
            f"'{name}-0.1' (all but a tenth) or '{name}+0.1' (that tenth)"
        )
    return found["split"], HoldOut(found["sign"], Fraction(share), f"{share.normalize():f}")


@dataclass(frozen=True)
class Picked:
    """Source of selected samples of another source, numbered from 0."""

    name: str
    source: Source
    picked: Samples
    """Sample indices `(N,)` in the full source, ascending."""
    identity: str
    """Name in the fingerprint."""

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class ids `(N,)`."""
        return self.source.labels[self.picked]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the full source."""
        return self.source.class_names

    @property
    def channels(self) -> int:
        """Number of channels of the pixels."""
        return self.source.channels

    @functools.cached_property
    def in_memory(self) -> NDArray[np.uint8] | None:
        """A copy of the selected images, or None if they are larger than `MAX_IN_MEMORY`."""
        whole = self.source.in_memory
        if whole is None or whole[0].nbytes * len(self.picked) > MAX_IN_MEMORY:
            return None
        return whole[self.picked]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the full source's fingerprint, the name and the selected samples."""
        return fingerprint(
            {"whole": self.source.fingerprint, "name": self.identity, "picked": sha256_of(self.picked)}
        )

    def sizes(self, samples: Samples) -> NDArray[np.int32]:
        """Return height and width `(n, 2)`."""
        return self.source.sizes(self.picked[samples])

    def pixels(self, samples: Samples) -> Pixels:
        """Return an array if `in_memory` is available, else a list."""
        if self.in_memory is not None:
            return self.in_memory[samples]
        return list(self.source.pixels(self.picked[samples]))

    def contents(self, samples: Samples) -> NDArray[np.uint32]:
        """Return the crc32c `(n,)` of each sample's raw content."""
        return self.source.contents(self.picked[samples])

    def path(self, sample: int) -> str | None:
        """Return the path of a sample's file, if it has one."""
        return self.source.path(int(self.picked[sample]))

    def check(self) -> None:
        """Check the full source."""
        self.source.check()

    def __getstate__(self) -> dict[str, Any]:
        return fields_only(self)


def hold_out(source: Source, held: HoldOut, identity: str | None = None) -> Source:
    """Return the part of a source that `held` selects.

    The share is taken class by class, and rounded so that the total is right: each class contributes its
    share of samples, plus or minus one.

    Args:
        source: full source.
        held: share, and which of the two parts.
        identity: name of the part in its fingerprint. Defaults to the name that opens it.

    Raises:
        RecipeError: one of the two parts would be empty.
    """
    labels = source.labels
    out = np.zeros(len(labels), dtype=bool)
    seen = 0
    ends = np.cumsum(np.bincount(labels))
    for own in np.split(_ascending(labels), ends[:-1]):
        members = shuffled(own, seed=0, view=0, purpose=Purpose.SPLIT)
        before, seen = seen, seen + len(members)
        out[members[: _rounded(held.share * seen) - _rounded(held.share * before)]] = True
    picked = np.flatnonzero(out if held.sign == "+" else ~out)
    if not 0 < len(picked) < len(labels):
        raise RecipeError(
            f"a share of {held.text} of source {source.name!r} is {int(out.sum())} of its {len(labels)} "
            "samples: choose one that leaves samples on both sides"
        )
    name = f"{source.name}{held}"
    return Picked(name, source, picked, identity or name)


def _rounded(value: Fraction) -> int:
    return int(value + Fraction(1, 2))


def subset(source: Source, limit: int | None) -> Samples:
    """Return the samples that a run uses: all, or `limit` of them.

    A limited subset is balanced over classes and the same in every run.

    Raises:
        RecipeError: `limit` is larger than the source, or not positive.
    """
    everything = np.arange(len(source.labels))
    if limit is None:
        return everything
    if not 1 <= limit <= len(everything):
        raise RecipeError(f"limit is {limit}, but source {source.name!r} has {len(everything)} samples")
    order = shuffled(everything, seed=0, view=0, purpose=Purpose.SUBSET)
    labels = source.labels[order]
    # Rank of each sample within its class: taking the lowest ranks first keeps classes even.
    rank = np.empty(len(order), dtype=np.int64)
    counts = np.bincount(labels)
    rank[_ascending(labels)] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[_ascending(rank)[:limit]])


def _ascending(numbers: NDArray[np.int64]) -> Samples:
    """Return the rows of small numbers in ascending order; rows with equal numbers keep their order."""
    # NumPy sorts integers of 16 bits or less in linear time.
    return np.argsort(numbers.astype(np.min_scalar_type(numbers.max(initial=0))), kind="stable")
