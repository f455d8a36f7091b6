"""Variational information distillation (VID): a Gaussian model of the teacher's features given the student's.

Ahn et al., CVPR 2019, arXiv 1904.05835, with the layers and numbers of RepDistiller (Tian et al. 2020).
The mean is a small network on the student's features; the variance is one number per channel of the teacher.
The loss is the mean negative log-likelihood without its constant, so it may be negative. The released code of
mdistiller hands the variances to no optimizer; `variance: fixed` is that form, a hint loss divided by twice
the variance.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.losses.adapters import as_maps, map_shapes
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

LEAST_VARIANCE = 1e-5


class VIDConfig(PairsConfig):
    """Config of variational information distillation.

    Pairs default to one per teacher and student block.
    """

    term: Literal["vid"] = "vid"
    variance: Literal["learned", "fixed"] = "learned"
    """Variance of each channel: `learned`, or `fixed` at `init_variance` as in the release of mdistiller."""
    init_variance: Annotated[float, Field(gt=LEAST_VARIANCE)] = 5.0
    """Initial variance of every channel."""


class FeatureModel(nn.Module):
    """Gaussian model of a teacher's features, given the student's.

    The mean has three 1x1 convolutions without bias, with ReLU between them. The larger of two maps is
    average-pooled to the size of the smaller.
    """

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        learned: bool = True,
        init_variance: float = 5.0,
    ) -> None:
        super().__init__()
        self.student_shape, self.teacher_shape = map_shapes(student_shape, teacher_shape)
        self.size = (
            min(self.student_shape[1], self.teacher_shape[1]),
            min(self.student_shape[2], self.teacher_shape[2]),
        )
        channels, target = self.student_shape[0], self.teacher_shape[0]
        self.mean = nn.Sequential(
            nn.Conv2d(channels, target, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(target, target, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(target, target, 1, bias=False),
        )
        # The inverse of softplus, so that the variance starts at `init_variance`.
        scale = torch.full((target,), math.log(math.expm1(init_variance - LEAST_VARIANCE)))
        if learned:
            self.log_scale = nn.Parameter(scale)
        else:
            self.register_buffer("log_scale", scale)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student's features, the mean and the variance."""
        mean = self.mean(F.adaptive_avg_pool2d(as_maps(student, self.student_shape), self.size))
        target = F.adaptive_avg_pool2d(as_maps(teacher, self.teacher_shape), self.size)
        return gaussian_loss(mean, target, F.softplus(self.log_scale) + LEAST_VARIANCE)


def gaussian_loss(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Return the mean over values of `1/2 ((mean - target)² / variance + log variance)`, `(N,)`.

    Args:
        mean: `(N, C, H, W)`, which receives the gradient.
        target: `(N, C, H, W)`.
        variance: variance of each channel `(C,)`, which receives the gradient.
    """
    variance = variance[:, None, None]
    return 0.5 * ((mean - target).square() / variance + variance.log()).flatten(1).mean(1)


class VID(nn.Module):
    """Sum of the models' losses over a teacher's pairs, averaged over teachers."""

    def __init__(self, config: VIDConfig, pairs: Sequence[FeaturePair], *, seed: int = 0) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        with seeded(seed):
            self.models = nn.ModuleList(
                FeatureModel(
                    pair.student_shape,
                    pair.teacher_shape,
                    learned=config.variance == "learned",
                    init_variance=config.init_variance,
                )
                for pair in pairs
            )

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student's features and the models."""
        losses = [
            model(inputs.student.features[pair.layer], teacher_features(inputs, pair))
            for pair, model in zip(self.pairs, self.models, strict=True)
        ]
        return torch.stack(losses).sum(0) / len({pair.teacher for pair in self.pairs})


def _needs(config: VIDConfig) -> Needs:
    return Needs(
        pairs=PairNeeds(config.pairs, config.layers, choose="every"), every_teacher="the pairs of vid"
    )


def _build(config: VIDConfig, context: BuildContext) -> VID:
    return VID(config, context.pairs, seed=context.seed)


LOSS = Loss(
    config=VIDConfig,
    formula="sum_l mean 1/2 ((mu_l(student) - teacher)² / v_c + log v_c), v learned per channel",
    source="Ahn et al. 2019 (VID), arXiv 1904.05835; RepDistiller, VIDLoss",
    needs=_needs,
    build=_build,
)
