"""Base types of fusions: config, needs, and a function that returns the teachers' weights for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from coursepack.config import Config
from coursepack.distill.losses.base import BuildContext, LossInputs, Needs, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Weigh = Callable[[LossInputs], Tensor | None]


class FusionConfig(Config):
    """Base class of the configs of fusions."""

    name: str = "fixed"
    """Name of the fusion, a key of `FUSIONS`."""

    @model_serializer(mode="wrap")
    def _keep_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}

    def refusal(self, teachers: int) -> str:
        """Return why the config does not fit this number of teachers, or an empty string if it does."""
        return ""

    def refusal_of_classes(self, known: Sequence[Sequence[int]], classes: int) -> str:
        """Return why the config does not fit teachers that know these classes, or an empty string if it does.

        Called only for fusions that unify.
        """
        return ""

    def refusal_of_epochs(self, teachers: int, epochs: int) -> str:
        """Return why the config does not fit a run of some epochs, or an empty string if it does."""
        return ""

    def fewest_epochs(self, teachers: int) -> int:
        """Return the smallest number of epochs of a run with this number of teachers."""
        return 1

    @property
    def has_label_phase(self) -> bool:
        """True if some epochs are trained on labels alone."""
        return False


def no_needs(_config: Any) -> Needs:
    """Return the needs of a fusion that reads only the teachers' logits."""
    return Needs()


@dataclass(frozen=True)
class Fusion:
    """One way to weight teachers.

    `build` returns a function, or a module if the fusion has parameters, that maps `LossInputs` to weights
    `(K,)` or `(N, K)`, or to None for 1/K. Weights sum to one over the teachers that are read (see `methods`
    for releases that normalize otherwise); only user-given weights of `fixed` are not normalized, and a
    sample's weights are all zero if no teacher counts for it (`abstains`).
    """

    config: type[FusionConfig]
    formula: str
    """Formula of the weights, in one line."""
    source: str
    """Paper or release."""
    combine: Literal["mixture", "sum"]
    """Published form of the loss: divergence from the mixture, or weighted sum of divergences."""
    build: Callable[[Any, BuildContext], Weigh]
    needs: Callable[[Any], Needs] = no_needs
    choose: Callable[[Any, BuildContext, Step], int | None] | None = None
    """Returns the index of the only teacher that is read for a batch, or None if the batch is trained on
    labels alone. No function means that all teachers are read."""
    every_batch: bool = False
    """True if `choose` may return another teacher for every batch of an epoch."""
    constant: bool = False
    """True if `choose` returns the same teacher for all batches, so that the other stores are never read."""
    trained_by: str = ""
    """Term that trains the fusion's parameters; it is part of every objective that fuses with them."""
    abstains: bool = False
    """True if the weights of a sample may all be zero, so that it has no soft targets."""
    unifies: bool = False
    """True if the module that `build` returns has `unify(logits, temperature)`, which makes one row of logits
    of all teachers at a temperature. Its teachers may know different classes of the source; those of other
    fusions know all."""
