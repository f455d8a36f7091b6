"""Transfer of activation boundaries (AB): the student's units switch on and off where the teacher's do.

Heo et al., AAAI 2019, arXiv 1811.03233, in the form of its release. Only the signs of the teacher's values
before the activation are read, one bit per value (`--tap LAYER:sign`). Layers should be tapped before their
ReLU on both sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.losses.adapters import (
    Regressor,
    check_both_maps_or_vectors,
    layer_factors,
)
from coursepack.distill.losses.base import (
    BuildContext,
    FeaturePair,
    Loss,
    LossInputs,
    Needs,
    PairNeeds,
)
from coursepack.distill.losses.pairs import PairsConfig, teacher_features
from coursepack.distill.schedule import value_at
from coursepack.models.build import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence


class ABConfig(PairsConfig):
    """Config of the transfer of activation boundaries.

    Pairs default to one per teacher and student block, each teacher's from shallow to deep.
    """

    term: Literal["ab"] = "ab"
    margin: Annotated[float, Field(gt=0)] = 1.0
    """Distance that the student's values keep from zero."""


class ActivationBoundaries(nn.Module):
    """Boundary loss of a teacher's pairs, halved with every layer before the last, averaged over teachers.

    If shapes differ, a convolution with batch normalization maps the student's features to the teacher's
    shape; equal shapes are compared as they are.
    """

    def __init__(self, config: ABConfig, pairs: Sequence[FeaturePair], *, seed: int = 0) -> None:
        super().__init__()
        check_both_maps_or_vectors(config.term, pairs, "signs")
        self.config = config
        self.pairs = tuple(pairs)
        self.factors = layer_factors(pairs)
        with seeded(seed):
            self.adapters = nn.ModuleList(_adapter(pair) for pair in pairs)

    def forward(self, inputs: LossInputs) -> Tensor | None:
        """Return the loss `(N,)`, or None in epochs in which its weight is zero.

        The student's features and the adapters receive the gradient.
        """
        if value_at(self.config.weight, inputs.step.epoch) == 0:
            return None
        losses = [
            factor
            * boundary_loss(
                adapter(inputs.student.features[pair.layer]),
                teacher_features(inputs, pair),
                self.config.margin,
            )
            for pair, adapter, factor in zip(self.pairs, self.adapters, self.factors, strict=True)
        ]
        return torch.stack(losses).sum(0)


def boundary_loss(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Return the sum over values of `relu(margin - sign(teacher) student)²`, `(N,)`.

    Args:
        student: `(N, ...)`, which receives the gradient.
        teacher: `(N, ...)`; only signs are read, and zero counts as negative.
        margin: distance from zero from which a student's value of the right sign has no loss.
    """
    short = torch.where(teacher > 0, margin - student, margin + student)
    return F.relu(short).square().flatten(1).sum(1)


def _adapter(pair: FeaturePair) -> nn.Module:
    if pair.student_shape == pair.teacher_shape:
        return nn.Identity()
    return Regressor(pair.student_shape, pair.teacher_shape)


def _needs(config: ABConfig) -> Needs:
    return Needs(
        pairs=PairNeeds(config.pairs, config.layers, ("sign", "margin", "map"), choose="every"),
        every_teacher="the pairs of ab",
        whole_batch=("the batch normalization of ab",),
    )


def _build(config: ABConfig, context: BuildContext) -> ActivationBoundaries:
    return ActivationBoundaries(config, context.pairs, seed=context.seed)


LOSS = Loss(
    config=ABConfig,
    formula="sum_l 2^(l - L) sum relu(m - sign(t) u_l(student))², t the teacher before its activation",
    source="Heo et al. 2019 (AB), arXiv 1811.03233; release bhheo/AB_distillation",
    needs=_needs,
    build=_build,
)
