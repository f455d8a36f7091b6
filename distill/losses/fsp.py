"""Flow of the solution procedure (FSP): products of the channels of two layers, averaged over positions.

Yim et al., CVPR 2017, equations 1 and 2. A flow `(C1, C2)` has no positions, so only layers with the
teacher's numbers of channels can be compared. Of two layers of different size, the larger is average-pooled,
as in RepDistiller.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from coursepack.distill.losses.base import BuildContext, Loss, Needs, PairNeeds, Unfit
from coursepack.distill.losses.pairs import PairLoss, PairsConfig, reduced_as, sketched_as
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.distill.losses.base import FeaturePair


class FlowConfig(PairsConfig):
    """Config of the flow of the solution procedure."""

    term: Literal["fsp"] = "fsp"


def flow_loss(student: Tensor, teacher: Tensor, values: int | None = None) -> Tensor:
    """Return the mean squared difference of flows, `(N,)`, with gradient to the student.

    Args:
        student: flows `(N, C1, C2)` of `reductions.pair_gram`, or sketches of them `(N, D)`.
        teacher: the same of the teacher; detached.
        values: C1 C2, the number of values of a flow before it was sketched; defaults to that of `teacher`.
    """
    squares = (student - teacher.detach()).square().flatten(1)
    return squares.sum(1) / (values or squares.shape[1])


def _compare(outputs: Sequence[Tensor], teacher: Tensor, pair: FeaturePair) -> Tensor:
    student = sketched_as(pair, reduced_as(pair, outputs))
    return flow_loss(student, teacher, math.prod(pair.teacher_shape))


def _unfit(pair: FeaturePair) -> Unfit | None:
    if len(pair.layers) != 2 or len(tap_from_name(pair.tap).layers) != 2:
        return Unfit("it takes a tap of two layers, as a+b:gram, and two layers of the student, as a+b")
    if pair.second_shape is None or not len(pair.student_shape) == len(pair.second_shape) == 3:
        return Unfit("it takes layers of the student that give maps (C, H, W)")
    channels = (pair.student_shape[0], pair.second_shape[0])
    if channels != pair.teacher_shape:
        return Unfit(
            f"the student's flow is {channels}, and flows have to be of the same numbers of channels: choose "
            "other layers with `pairs`, or a student as wide as the teacher"
        )
    return None


def _needs(config: FlowConfig) -> Needs:
    pairs = PairNeeds(
        config.pairs, config.layers, ("gram",), choose="flows", maps=True, sketches=("gram",), unfit=_unfit
    )
    return Needs(pairs=pairs, every_teacher="flows")


def _build(_config: FlowConfig, context: BuildContext) -> PairLoss:
    return PairLoss(context.pairs, _compare)


LOSS = Loss(
    config=FlowConfig,
    formula="sum_l mean_ij (F_l - F_kl)_ij², F = mean_hw f1_i f2_j, averaged over teachers",
    source="Yim et al. 2017 (FSP), CVPR, equations 1 and 2",
    needs=_needs,
    build=_build,
)
