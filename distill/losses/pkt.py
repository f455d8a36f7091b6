"""Probabilistic knowledge transfer (PKT): how likely a sample of the batch is taken for another.

Passalis and Tefas, ECCV 2018, arXiv 1803.10837, with the cosine kernel; constants and mean as
in the authors' code. Maps are averaged over positions.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from coursepack.distill.losses.base import BuildContext, Loss, Needs, PairNeeds
from coursepack.distill.losses.pairs import PairLoss, PairsConfig, pooled_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.distill.losses.base import FeaturePair


class ProbabilisticConfig(PairsConfig):
    """Config of probabilistic knowledge transfer."""

    term: Literal["pkt"] = "pkt"
    eps: Annotated[float, Field(gt=0)] = 1e-7
    """Constant that is added to norms and to probabilities."""


def probabilistic_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Return the mean over all pairs of samples of `p log((p + eps) / (q + eps))`, a scalar.

    p of the teacher and q of the student are `(1 + cos) / 2`, divided by the sum of a row.

    Args:
        student: embeddings `(N, D)`, which receive the gradient.
        teacher: embeddings `(N, D')`; detached.
        eps: constant that is added to norms and to probabilities.
    """
    student_probs, teacher_probs = _conditional_probs(student, eps), _conditional_probs(teacher.detach(), eps)
    ratio: Tensor = (teacher_probs + eps) / (student_probs + eps)
    return (teacher_probs * ratio.log()).mean()


def _conditional_probs(embedding: Tensor, eps: float) -> Tensor:
    unit = embedding / (torch.linalg.vector_norm(embedding, dim=1, keepdim=True) + eps)
    kernel: Tensor = (unit @ unit.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def _compare(eps: float, outputs: Sequence[Tensor], teacher: Tensor, _pair: FeaturePair) -> Tensor:
    return probabilistic_loss(pooled_features(outputs[0]), pooled_features(teacher), eps)


def _needs(config: ProbabilisticConfig) -> Needs:
    pairs = PairNeeds(config.pairs, config.layers, ("pooled", "map"), choose="last")
    return Needs(pairs=pairs, whole_batch=("pkt",), every_teacher="probabilities of samples")


def _build(config: ProbabilisticConfig, context: BuildContext) -> PairLoss:
    return PairLoss(context.pairs, partial(_compare, config.eps))


LOSS = Loss(
    config=ProbabilisticConfig,
    formula="mean_ij p_ij log((p_ij + eps) / (q_ij + eps)), rows of (1 + cos) / 2 divided by their sums",
    source="Passalis and Tefas 2018 (PKT), arXiv 1803.10837, and the authors' code",
    needs=_needs,
    build=_build,
)
