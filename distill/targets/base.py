"""Targets of a batch, and the protocol of their sources: stores, or teachers run live."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from coursepack.data.store.manifest import LOGITS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.data.randomness import Samples
    from coursepack.kernels import Rows

FEATURES = "features/"
"""Prefix of the names of arrays that hold tapped features."""


@dataclass(frozen=True)
class Targets:
    """Answers of the teachers to one batch: what the objectives declared, and no more."""

    logits: list[Tensor | Rows]
    """Per teacher that was read `(N, C)`; empty where no objective reads logits."""
    features: dict[tuple[int, str], Tensor | Rows] = field(default_factory=dict)
    """`(N, ...)` by the teacher's index and the name of the tap."""
    teachers: tuple[int, ...] = ()
    """Indices of the teachers that were read; empty means all, in order."""

    @property
    def indices(self) -> tuple[int, ...]:
        """Index of the teacher of each entry of `logits`."""
        return self.teachers or tuple(range(len(self.logits)))

    def only(self, index: int) -> Targets:
        """Return the targets of one teacher."""
        return Targets([self.logits[self.indices.index(index)]], self.features, (index,))

    def features_of(self, index: int, tap: str) -> Tensor | Rows:
        """Return the features `(N, ...)` of one teacher's tap."""
        return self.features[index, tap]


class TargetSource(Protocol):
    """Where targets come from."""

    def fetch(self, batch: Batch, teachers: Sequence[int] | None = None) -> Targets:
        """Targets of a batch, from all teachers or from those at the given places."""

    def open(self, view: int, teachers: Sequence[int] | None = None) -> None:
        """Open what a view is read from, and check it, before the first batch asks for it."""

    def prefetch(self, view: int) -> None:
        """Say which view will be asked for next."""

    def will_need(self, view: int, samples: Samples) -> None:
        """Say which rows will be asked for soon."""

    def check_unchanged(self) -> None:
        """Refuse targets whose files were changed since they were opened."""

    def check_finite(self, views: Sequence[int]) -> None:
        """Refuse targets of the given views that are not finite: look for the cause of a loss that is not."""


def targets_of(arrays: Mapping[tuple[int, str], Tensor | Rows], indices: Sequence[int]) -> Targets:
    """Return the targets made of arrays, which are keyed by teacher index and array name."""
    return Targets(
        [arrays[index, LOGITS] for index in indices if (index, LOGITS) in arrays],
        {
            (index, name.removeprefix(FEATURES)): rows
            for (index, name), rows in arrays.items()
            if name.startswith(FEATURES)
        },
        tuple(indices),
    )
