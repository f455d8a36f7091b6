"""What every fusion is: its numbers, its needs, and the weights that it gives the teachers of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from coursepack.config import Config
from coursepack.distill.losses.base import BuildContext, LossInputs, Needs, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Weigh = Callable[[LossInputs], Tensor | None]


class FusionConfig(Config):
    """Base of every fusion's numbers."""

    name: str = "fixed"
    """A name in `FUSIONS`."""

    @model_serializer(mode="wrap")
    def _keep_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}

    def refusal(self, teachers: int) -> str:
        """Say why the numbers do not fit so many teachers; empty where they do."""
        return ""


def no_needs(_config: Any) -> Needs:
    """Return the needs of a fusion that only reads the teachers' logits."""
    return Needs()


@dataclass(frozen=True)
class Fusion:
    """One way to weigh teachers.

    `build` returns a function, or a module where something is learned, from `LossInputs` to weights `(K,)` or
    `(N, K)`, or to None for 1/K. Weights sum to one over the teachers that are read, whatever a release did
    (see `methods`), but for given weights of `fixed`, which are taken as they are.
    """

    config: type[FusionConfig]
    formula: str
    source: str
    combine: Literal["mixture", "sum"]
    """The published form: the divergence from the mixture, or the weighted sum of divergences."""
    build: Callable[[Any, BuildContext], Weigh]
    needs: Callable[[Any], Needs] = no_needs
    choose: Callable[[Any, BuildContext, Step], int] | None = None
    """Index of the only teacher that is read for a batch; None where all are."""
