"""Correlation congruence (CC): similarities of the samples of a batch under a Gaussian kernel.

Peng et al., ICCV 2019, arXiv 1904.01802, with the kernel's Taylor series for embeddings of unit length. The
paper's text was not available; formula and numbers are those of AberHu/Knowledge-Distillation-Zoo. Maps are
averaged over positions, and there is no learned layer before the kernel.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch.nn.functional as F
from pydantic import Field

from coursepack.distill.losses.base import BuildContext, Loss, Needs, PairNeeds
from coursepack.distill.losses.pairs import PairLoss, PairsConfig, pooled_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.distill.losses.base import FeaturePair


class CorrelationConfig(PairsConfig):
    """Config of correlation congruence."""

    term: Literal["cc"] = "cc"
    gamma: Annotated[float, Field(gt=0)] = 0.4
    """Inverse squared width of the Gaussian kernel `exp(-gamma |x - y|²)`."""
    order: Annotated[int, Field(ge=1)] = 2
    """Highest power of the kernel's Taylor series."""


def correlation_loss(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Return the mean over all pairs of samples of `(K_student - K_teacher)²`, a scalar.

    Args:
        student: embeddings `(N, D)`, which receive the gradient.
        teacher: embeddings `(N, D')`; detached.
        gamma: inverse squared width of the kernel.
        order: highest power of its Taylor series.
    """
    return F.mse_loss(_correlations(student, gamma, order), _correlations(teacher.detach(), gamma, order))


def _correlations(embedding: Tensor, gamma: float, order: int) -> Tensor:
    """Return the kernel `exp(-2 gamma) sum_p (2 gamma cos)^p / p!` of all pairs, `(N, N)`."""
    unit = F.normalize(embedding)
    scaled = 2 * gamma * (unit @ unit.T)
    kernel = 1 + scaled
    for power in range(2, order + 1):
        kernel = kernel + scaled**power / math.factorial(power)
    return math.exp(-2 * gamma) * kernel


def _compare(
    gamma: float, order: int, outputs: Sequence[Tensor], teacher: Tensor, _pair: FeaturePair
) -> Tensor:
    return correlation_loss(pooled_features(outputs[0]), pooled_features(teacher), gamma, order)


def _needs(config: CorrelationConfig) -> Needs:
    pairs = PairNeeds(config.pairs, config.layers, ("pooled", "map"), choose="last")
    return Needs(pairs=pairs, whole_batch=("cc",), every_teacher="correlations of samples")


def _build(config: CorrelationConfig, context: BuildContext) -> PairLoss:
    return PairLoss(context.pairs, partial(_compare, config.gamma, config.order))


LOSS = Loss(
    config=CorrelationConfig,
    formula="mean_ij (K_ij - K_kij)², K = exp(-2 g) sum_p (2 g cos)^p / p!, p = 0 .. 2, g = 0.4",
    source="Peng et al. 2019 (CC), arXiv 1904.01802; formula of a re-implementation",
    needs=_needs,
    build=_build,
)
