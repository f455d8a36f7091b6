"""Similarity-preserving distillation (SP): which samples of a batch activate a layer in the same way.

Tung and Mori, ICCV 2019, arXiv 1907.09682, equation 4. Maps are compared with all their positions. A
teacher's sketch is compared with the student's whole features: both give similarities of samples, and a
projection of the student would only add noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F

from coursepack.distill.losses.base import BuildContext, Loss, Needs, PairNeeds
from coursepack.distill.losses.pairs import PairLoss, PairsConfig, reduced_as, unfit_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.distill.losses.base import FeaturePair


class SimilarityConfig(PairsConfig):
    """Config of the similarity-preserving loss."""

    term: Literal["sp"] = "sp"


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `||G_student - G_teacher||² / N²`, a scalar, with gradient to the student.

    G `(N, N)` has the inner products of the samples' features, each row divided by its Euclidean norm.

    Args:
        student: features `(N, ...)`.
        teacher: features `(N, ...)` of any other shape; detached.
    """
    return F.mse_loss(_similarities(student), _similarities(teacher.detach()))


def _similarities(features: Tensor) -> Tensor:
    flat = features.flatten(1)
    return F.normalize(flat @ flat.T)


def _compare(outputs: Sequence[Tensor], teacher: Tensor, pair: FeaturePair) -> Tensor:
    return similarity_loss(reduced_as(pair, outputs), teacher)


def _needs(config: SimilarityConfig) -> Needs:
    pairs = PairNeeds(
        config.pairs,
        config.layers,
        ("map", "pooled"),
        choose="last",
        sketches=("map", "pooled"),
        unfit=unfit_size,
    )
    return Needs(pairs=pairs, whole_batch=("sp",), every_teacher="similarities of samples")


def _build(_config: SimilarityConfig, context: BuildContext) -> PairLoss:
    return PairLoss(context.pairs, _compare)


LOSS = Loss(
    config=SimilarityConfig,
    formula="||G - G_k||² / N², G = rows of f f' divided by their norm, averaged over teachers",
    source="Tung and Mori 2019 (SP), arXiv 1907.09682, equation 4",
    needs=_needs,
    build=_build,
)
