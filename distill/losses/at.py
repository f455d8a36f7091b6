"""Attention transfer (AT): where in the image the student's and the teacher's layers are active.

Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928, section 3.1. An attention map is the mean of squares
over channels, `(N, H W)`, scaled to unit length. Maps of another size are average-pooled before they are
squared, as in RepDistiller.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from coursepack.distill.losses.base import BuildContext, Loss, Needs, PairNeeds
from coursepack.distill.losses.pairs import PairLoss, PairsConfig, map_size, resized_to, unfit_maps
from coursepack.models import reductions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.distill.losses.base import FeaturePair


class AttentionConfig(PairsConfig):
    """Config of attention transfer."""

    term: Literal["at"] = "at"
    distance: Literal["squared", "norm"] = "squared"
    """Distance of two maps: the mean of squared differences as in the authors' code, or the norm of
    equation 2."""


def attention_loss(student: Tensor, teacher: Tensor, distance: str = "squared") -> Tensor:
    """Return the distance of attention maps scaled to unit length, `(N,)`, with gradient to the student.

    Args:
        student: attention maps `(N, P)` of any scale.
        teacher: attention maps `(N, P)`; detached.
        distance: a value of `AttentionConfig.distance`.
    """
    gap = F.normalize(student) - F.normalize(teacher.detach())
    return torch.linalg.vector_norm(gap, dim=1) if distance == "norm" else gap.square().mean(1)


def _compare(distance: str, outputs: Sequence[Tensor], teacher: Tensor, pair: FeaturePair) -> Tensor:
    size = map_size(pair)
    if teacher.ndim == 4:
        teacher = reductions.attention(resized_to(teacher, size))
    return attention_loss(reductions.attention(resized_to(outputs[0], size)), teacher, distance)


def _needs(config: AttentionConfig) -> Needs:
    pairs = PairNeeds(
        config.pairs, config.layers, ("attention", "map"), choose="every", maps=True, unfit=unfit_maps
    )
    return Needs(pairs=pairs, every_teacher="attention maps")


def _build(config: AttentionConfig, context: BuildContext) -> PairLoss:
    return PairLoss(context.pairs, partial(_compare, config.distance))


LOSS = Loss(
    config=AttentionConfig,
    formula="sum_l mean_hw (Q_l - Q_kl)², Q = A / ||A||, A = mean_c f_c², averaged over teachers",
    source="Zagoruyko and Komodakis 2017 (AT), arXiv 1612.03928, equation 2 and the authors' code",
    needs=_needs,
    build=_build,
)
