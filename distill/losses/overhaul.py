"""Comprehensive overhaul of feature distillation (OFD): a partial distance before the activation.

Heo et al., ICCV 2019, arXiv 1904.01866, in the form of its release. The target is the teacher's value before
its ReLU, but no lower than the channel's margin, the expected negative value. Where the target is not
positive and the student is below it, the loss is zero. Stores hold targets (`--tap BN:margin`). A margin is
negative, so the target is positive exactly where the teacher is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
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
from coursepack.models.build import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence


class OFDConfig(PairsConfig):
    """Config of the overhaul of feature distillation.

    Pairs default to one per teacher and student block, each teacher's from shallow to deep.
    """

    term: Literal["ofd"] = "ofd"


class Overhaul(nn.Module):
    """Partial distance of a teacher's pairs, halved with every layer before the last, averaged over teachers.

    The student's features pass through a 1x1 convolution with batch normalization.
    """

    def __init__(self, pairs: Sequence[FeaturePair], *, seed: int = 0) -> None:
        super().__init__()
        check_both_maps_or_vectors("ofd", pairs, "values")
        self.pairs = tuple(pairs)
        self.factors = layer_factors(pairs)
        with seeded(seed):
            self.adapters = nn.ModuleList(
                Regressor(pair.student_shape, pair.teacher_shape, pointwise=True) for pair in pairs
            )

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student's features and the adapters."""
        losses = [
            factor
            * partial_distance(adapter(inputs.student.features[pair.layer]), teacher_features(inputs, pair))
            for pair, adapter, factor in zip(self.pairs, self.adapters, self.factors, strict=True)
        ]
        return torch.stack(losses).sum(0)


def partial_distance(student: Tensor, target: Tensor) -> Tensor:
    """Return the sum over values of `(student - target)²` where `student > target` or `target > 0`, `(N,)`.

    Args:
        student: `(N, ...)`, which receives the gradient.
        target: `(N, ...)`, the teacher's values, no lower than their channel's margin.
    """
    counted = (student > target) | (target > 0)
    return ((student - target).square() * counted).flatten(1).sum(1)


def _needs(config: OFDConfig) -> Needs:
    return Needs(
        pairs=PairNeeds(config.pairs, config.layers, ("margin",), choose="every"),
        every_teacher="the pairs of ofd",
        whole_batch=("the batch normalization of ofd",),
    )


def _build(_config: OFDConfig, context: BuildContext) -> Overhaul:
    return Overhaul(context.pairs, seed=context.seed)


LOSS = Loss(
    config=OFDConfig,
    formula="sum_l 2^(l - L) sum (u_l(s) - t')² 1{u_l(s) > t' or t' > 0}, t' = max(t, margin)",
    source="Heo et al. 2019 (OFD), arXiv 1904.01866; release clovaai/overhaul-distillation",
    needs=_needs,
    build=_build,
)
