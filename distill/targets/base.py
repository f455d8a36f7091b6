"""Targets of a batch, and the protocol of their sources: stores, or teachers run live."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from coursepack.data.store.manifest import FEATURES, LOGITS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.data.randomness import Samples
    from coursepack.kernels import Rows


@dataclass(frozen=True)
class Targets:
    """Teachers' outputs for one batch, limited to those that the objectives read."""

    logits: list[Tensor | Rows]
    """Logits `(N, C)` of each teacher that was read, or of the classes that it knows; empty if no objective
    reads logits."""
    features: dict[tuple[int, str], Tensor | Rows] = field(default_factory=dict)
    """Features `(N, ...)` by teacher index and tap name."""
    teachers: tuple[int, ...] = ()
    """Teacher index of each entry of `logits`; empty means all teachers, in order."""

    @property
    def indices(self) -> tuple[int, ...]:
        """Teacher index of each entry of `logits`."""
        return self.teachers or tuple(range(len(self.logits)))

    def only(self, index: int) -> Targets:
        """Return the targets of one teacher."""
        return Targets([self.logits[self.indices.index(index)]], self.features, (index,))

    def features_of(self, index: int, tap: str) -> Tensor | Rows:
        """Return the features `(N, ...)` of one teacher's tap."""
        return self.features[index, tap]


class TargetSource(Protocol):
    """Source of the teachers' targets."""

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """Return the targets for a batch, of all teachers or of those with the given indices."""

    def open(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Open and check the files of a view before its first batch."""

    def prefetch(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Start to open the files of the next view in the background."""

    def will_need(self, view: int, samples: Samples, teachers: Sequence[int] | None = None) -> None:
        """Start to read rows of a view in the background."""

    def check_unchanged(self) -> None:
        """Raise an error if files were changed since they were opened."""

    def check_finite(self, views: Sequence[int]) -> None:
        """Raise an error if targets of the given views are not finite."""


def targets_of(arrays: Mapping[tuple[int, str], Tensor | Rows], indices: Sequence[int]) -> Targets:
    """Return the targets made of arrays, which are keyed by teacher index and array name."""
    with_logits = tuple(index for index in indices if (index, LOGITS) in arrays)
    return Targets(
        [arrays[index, LOGITS] for index in with_logits],
        {
            (index, name.removeprefix(FEATURES)): rows
            for (index, name), rows in arrays.items()
            if name.startswith(FEATURES)
        },
        with_logits,
    )
