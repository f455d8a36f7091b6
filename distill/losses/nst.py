"""Neuron selectivity transfer (NST): which positions of a layer are active together, over its channels.

Huang and Wang 2017, arXiv 1707.01219, equation 5 with the polynomial kernel (x . y)². The maximum mean
discrepancy of the channels, each scaled to unit length over its positions, is the squared distance of two
matrices `(P, P)` of the P = H W positions, `reductions.gram`: only the teacher's matrix is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from coursepack.distill.losses.base import BuildContext, Loss, Needs, PairNeeds
from coursepack.distill.losses.pairs import (
    PairLoss,
    PairsConfig,
    map_size,
    resized_to,
    sketched_as,
    unfit_maps,
)
from coursepack.models import reductions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.distill.losses.base import FeaturePair


class SelectivityConfig(PairsConfig):
    """Config of neuron selectivity transfer."""

    term: Literal["nst"] = "nst"


def selectivity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of matrices, `(N,)`, with gradient to the student.

    Args:
        student: matrices `(N, P, P)` of `reductions.gram`, or sketches of them `(N, D)`.
        teacher: the same of the teacher; detached.
    """
    return (student - teacher.detach()).square().flatten(1).sum(1)


def _compare(outputs: Sequence[Tensor], teacher: Tensor, pair: FeaturePair) -> Tensor:
    size = map_size(pair)
    if teacher.ndim == 4:
        teacher = reductions.gram(resized_to(teacher, size))
    student = sketched_as(pair, reductions.gram(resized_to(outputs[0], size)))
    return selectivity_loss(student, teacher)


def _needs(config: SelectivityConfig) -> Needs:
    pairs = PairNeeds(
        config.pairs,
        config.layers,
        ("gram", "map"),
        choose="last",
        maps=True,
        sketches=("gram",),
        unfit=unfit_maps,
    )
    return Needs(pairs=pairs, every_teacher="similarities of positions")


def _build(_config: SelectivityConfig, context: BuildContext) -> PairLoss:
    return PairLoss(context.pairs, _compare)


LOSS = Loss(
    config=SelectivityConfig,
    formula="||G - G_k||², G = mean_c f_c f_c', each channel f_c of unit length over positions",
    source="Huang and Wang 2017 (NST), arXiv 1707.01219, equation 5 with the kernel (x . y)²",
    needs=_needs,
    build=_build,
)
