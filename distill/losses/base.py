"""What a term of an objective may look at: one batch, seen by one student and its teachers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from coursepack.distill.targets.stores import Targets
    from coursepack.kernels import MixedLabels


@dataclass(frozen=True)
class Moment:
    """Where training is: what schedules and draws depend on."""

    epoch: int = 0
    batch: int = 0
    """Number of the batch within its epoch."""
    part: int = 0
    """Number of the part within its batch, where a batch is worked through in parts."""


@dataclass(frozen=True)
class Inside:
    """What was caught inside a student on one forward pass, with gradient."""

    representation: Tensor | None = None
    """`(N, D)`: what its head reads, or a layer's largest value over places."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Outputs `(N, ...)` of tapped layers."""

    def float(self) -> Inside:
        """The same in float32."""
        return self.each(lambda value: value.float())

    def each(self, change: Callable[[Tensor], Tensor]) -> Inside:
        """The same with every tensor changed."""
        representation = None if self.representation is None else change(self.representation)
        return Inside(representation, {name: change(value) for name, value in self.features.items()})


@dataclass(frozen=True)
class Facts:
    """One batch."""

    student_logits: Tensor
    """`(N, C)`, with gradient."""
    inside: Inside
    labels: Tensor | MixedLabels
    targets: Targets | None
    """What the chosen teachers said."""
    moment: Moment = Moment()

    @property
    def teachers(self) -> Targets:
        """The targets.

        Raises:
            RecipeError: there are none.
        """
        if self.targets is None:
            raise RecipeError("this objective needs teachers, but was given no targets")
        return self.targets
