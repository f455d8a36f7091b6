"""Sequential teaching: one teacher after the other, each for some epochs, and optionally labels alone last.

Each batch reads the one teacher of its phase, so an epoch reads a single store, and none in the last phase.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from coursepack.distill.fusion.base import Weigh
    from coursepack.distill.losses.base import BuildContext, Step


class SequenceConfig(FusionConfig):
    """Config of teachers that follow one another."""

    name: Literal["sequence"] = "sequence"
    epochs: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Number of epochs with each teacher, in the order of the stores; defaults to equal shares of the epochs
    before the last phase. If they do not divide evenly, later shares are longer."""
    label_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of epochs of a last phase on labels alone, in which no teacher is read."""

    @property
    def has_label_phase(self) -> bool:
        """True if there is a last phase on labels alone."""
        return self.label_epochs > 0

    def refusal(self, teachers: int) -> str:
        """Return an error if the number of phases is not the number of teachers."""
        if self.epochs is None or len(self.epochs) == teachers:
            return ""
        return f"fusion.epochs has {len(self.epochs)} numbers, expected {teachers}: one per store"

    def fewest_epochs(self, teachers: int) -> int:
        """Return the number of epochs of all phases, with one per teacher if they share the run."""
        return (teachers if self.epochs is None else sum(self.epochs)) + self.label_epochs

    def refusal_of_epochs(self, teachers: int, epochs: int) -> str:
        """Return an error if the phases do not fill the run."""
        fewest = self.fewest_epochs(teachers)
        if self.epochs is None:
            if epochs >= fewest:
                return ""
            last = f" and {self.label_epochs} epochs on labels alone" if self.label_epochs else ""
            return (
                f"fusion 'sequence' has {_plural(teachers, 'teacher')}{last}, but the run has "
                f"{_plural(epochs, 'epoch')}: give --epochs {fewest} or more, at least one per teacher"
            )
        if epochs == fewest:
            return ""
        return (
            f"fusion.epochs are {list(self.epochs)} and fusion.label_epochs is {self.label_epochs}, "
            f"{_plural(fewest, 'epoch')} in all, but the run has {epochs}: give --epochs {fewest}, or other "
            "phases; without fusion.epochs the teachers share the run"
        )

    def ends(self, teachers: int, epochs: int) -> tuple[int, ...]:
        """Return the epoch in which each teacher's phase has ended.

        >>> SequenceConfig(label_epochs=3).ends(3, 20)
        (5, 11, 17)
        """
        if self.epochs is not None:
            return tuple(itertools.accumulate(self.epochs))
        taught = epochs - self.label_epochs
        return tuple(index * taught // teachers for index in range(1, teachers + 1))


def teacher_of_phase(config: SequenceConfig, context: BuildContext, step: Step) -> int | None:
    """Return the index of the teacher of an epoch; None in the last phase, on labels alone."""
    for index, end in enumerate(config.ends(context.teachers, context.epochs)):
        if step.epoch < end:
            return index
    return None if config.label_epochs else context.teachers - 1


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _build(config: SequenceConfig, context: BuildContext) -> Weigh:
    if config.epochs is None and not context.epochs:
        raise RecipeError(
            "fusion 'sequence' divides the epochs of a run among its teachers, but their number is not "
            "known: set fusion.epochs, or pass epochs"
        )
    return lambda _inputs: None


SEQUENCE = Fusion(
    config=SequenceConfig,
    formula="w_k = 1 for the teacher of the epoch's phase; the others are not read",
    source="sequential teaching: teachers in order, each for some epochs",
    combine="mixture",
    build=_build,
    choose=teacher_of_phase,
)
