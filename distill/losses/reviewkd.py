"""Knowledge review (ReviewKD): fused student levels are regressed to a teacher's maps at several scales.

Chen, Liu, Zhao and Jia, CVPR 2021, arXiv 2104.09044. From deep to shallow, an attention-based fusion module
(ABF) combines a level of the student with what was fused from all deeper levels, so that every level of the
teacher guides the student's level of the same depth and all that are deeper. The distance is the hierarchical
context loss (HCL): squared errors of the maps and of their averages over grids of 4 x 4, 2 x 2 and 1 cells.
The modules normalize over the batch, so a sample's loss depends on the other samples. With several teachers,
each has modules of its own, and the loss is the mean over teachers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    from collections.abc import Mapping, Sequence

MAX_CHANNELS = 512
"""Upper bound of the channels between levels; they are those of the student's deepest level otherwise."""
GRIDS = (4, 2, 1)
"""Sides of the grids over which maps are averaged, with the weights 1/2, 1/4 and 1/8."""


class ReviewKDConfig(PairsConfig):
    """Config of the knowledge review.

    Pairs default to one per teacher and student block, from shallow to deep. A tap `LAYER:pooled` is a level
    of one position, for which the student's map is averaged as well.
    """

    term: Literal["reviewkd"] = "reviewkd"


class AttentionFusion(nn.Module):
    """Attention-based fusion (ABF) of one level of the student with the levels below it.

    A 1x1 convolution maps the level to the channels between levels. Two attention maps, computed from both
    sides, weigh it and the upsampled deeper level. A 3x3 convolution maps the sum, at the teacher's size, to
    the teacher's channels. Both convolutions are followed by batch normalization, without activation.
    """

    def __init__(
        self, student_shape: Sequence[int], teacher_shape: Sequence[int], channels: int, *, fuses: bool
    ) -> None:
        """Initialize the module.

        Args:
            student_shape: shape `(C,)` or `(C, H, W)` of the student's level.
            teacher_shape: shape `(D,)` or `(D, H, W)` of the teacher's level.
            channels: channels between levels.
            fuses: whether there is a deeper level.
        """
        super().__init__()
        self.size = tuple(teacher_shape[1:]) or (1, 1)
        self.is_pooled = len(teacher_shape) == 1
        self.enter = _normalized(nn.Conv2d(student_shape[0], channels, 1, bias=False))
        self.leave = _normalized(nn.Conv2d(channels, teacher_shape[0], 3, padding=1, bias=False))
        self.attention = nn.Conv2d(2 * channels, 2, 1) if fuses else None

    def forward(self, features: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the level `(N, D, H, W)` to compare, and what the next shallower level fuses.

        Args:
            features: the student's level, `(N, C)` or `(N, C, H, W)`.
            deeper: second result of the next deeper level; None for the deepest.
        """
        maps = features if features.ndim == 4 else features[:, :, None, None]
        fused = self.enter(F.adaptive_avg_pool2d(maps, 1) if self.is_pooled else maps)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:])
            own, below = self.attention(torch.cat([fused, deeper], 1)).sigmoid().split(1, 1)
            fused = fused * own + deeper * below
        if fused.shape[2:] != self.size:
            fused = F.interpolate(fused, self.size)
        return self.leave(fused), fused


def _normalized(convolution: nn.Conv2d) -> nn.Sequential:
    """Append batch normalization to a convolution, with weights from U(-b, b), b² = 3 / fan-in."""
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


class Levels(nn.Module):
    """Fusion modules of the levels that one teacher guides."""

    def __init__(self, pairs: Sequence[FeaturePair]) -> None:
        """Initialize the modules of pairs that go from shallow to deep."""
        super().__init__()
        self.pairs = tuple(pairs)
        channels = min(MAX_CHANNELS, pairs[-1].student_shape[0])
        deepest = len(pairs) - 1
        self.fusions = nn.ModuleList(
            AttentionFusion(pair.student_shape, pair.teacher_shape, channels, fuses=level < deepest)
            for level, pair in enumerate(pairs)
        )

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Return each level `(N, D, H, W)`, shallow to deep, from the student's features by layer."""
        outputs: list[Tensor] = []
        deeper: Tensor | None = None
        for pair, fusion in zip(reversed(self.pairs), reversed(self.fusions), strict=True):
            output, deeper = fusion(features[pair.layer].float(), deeper)
            outputs.append(output)
        return outputs[::-1]


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the hierarchical context loss (HCL) of maps `(N, D, H, W)`, `(N,)`; gradient to the student.

    It is the mean squared error of the maps, and of their averages over each grid of `GRIDS` that is smaller
    than the map, with the weights 1, 1/2, 1/4, ... divided by their sum.
    """
    grids = [grid for grid in GRIDS if grid < student.shape[2]]
    total = _mean_squares(student - teacher)
    for power, grid in enumerate(grids, start=1):
        total = total + _mean_squares(F.adaptive_avg_pool2d(student - teacher, grid)) / 2**power
    return total / math.fsum(2**-power for power in range(len(grids) + 1))


def _mean_squares(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


class ReviewKD(nn.Module):
    """Knowledge review: the mean over teachers of the sum over levels."""

    def __init__(self, pairs: Sequence[FeaturePair], *, seed: int = 0) -> None:
        super().__init__()
        teachers = dict.fromkeys(pair.teacher for pair in pairs)
        with seeded(seed):
            self.levels = nn.ModuleList(
                Levels([pair for pair in pairs if pair.teacher == teacher]) for teacher in teachers
            )

    def forward(self, inputs: LossInputs) -> Tensor | None:
        """Return the loss `(N,)`, with gradient to the student's features and the fusion modules.

        A batch of one sample has no statistics to normalize with; it adds nothing.
        """
        if len(inputs.student.logits) == 1:
            return None
        total = torch.zeros_like(inputs.student.logits[:, 0], dtype=torch.float32)
        for levels in self.levels:
            assert isinstance(levels, Levels)
            for pair, output in zip(levels.pairs, levels(inputs.student.features), strict=True):
                target = teacher_features(inputs, pair)
                total = total + hierarchical_context_loss(output, target.reshape(output.shape))
        return total / len(self.levels)


def _needs(config: ReviewKDConfig) -> Needs:
    return Needs(
        pairs=PairNeeds(config.pairs, config.layers, choose="every"),
        every_teacher="reviewed features",
        whole_batch=("batch normalization of reviewed features",),
    )


def _build(_config: ReviewKDConfig, context: BuildContext) -> ReviewKD:
    return ReviewKD(context.pairs, seed=context.seed)


LOSS = Loss(
    config=ReviewKDConfig,
    formula="mean_k sum_l HCL(ABF_l(student's levels l and deeper), teacher k's level l)",
    source="Chen, Liu, Zhao and Jia 2021 (ReviewKD), arXiv 2104.09044, and its release",
    needs=_needs,
    build=_build,
)
