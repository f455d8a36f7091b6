"""Hint loss: student features, mapped by a learnable adapter per pair, are regressed to teachers' features.

Romero et al., ICLR 2015, arXiv 1412.6550, equation 3 (FitNets). With several teachers, each guides one group
of the student's layers: Liu et al. 2020, arXiv 2103.04062, section 3.4 (AMTML-KD). That paper does not state
which teacher guides which group; here teachers are assigned from shallow to deep in the order of the stores.
The teacher's features are not transformed, so the linear adapter has no final activation. `adapter:
conv-bn-relu` is the regressor of RepDistiller (Tian et al. 2020), for features after a ReLU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from coursepack.distill.losses.adapters import Regressor
from coursepack.distill.losses.base import (
    BuildContext,
    FeaturePair,
    Loss,
    LossInputs,
    Needs,
    PairNeeds,
)
from coursepack.distill.losses.pairs import PairsConfig, pooled_features, resized_to, teacher_features
from coursepack.kernels.regression import linear_squared_error, squared_error
from coursepack.models.build import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.kernels import Rows


class HintConfig(PairsConfig):
    """Config of the hint loss.

    Pairs default to one per teacher; the teachers are spread over the student's blocks, shallow to deep.
    """

    term: Literal["hint"] = "hint"
    adapter: Literal["linear", "conv-bn-relu"] = "linear"
    """Learnable map from the student's features to the teacher's: a linear map at every position, or a
    convolution with batch normalization and ReLU, which couples the samples of a batch."""


class Adapter(nn.Module):
    """Learnable map from student features to the shape of a teacher's features.

    Between two maps, adaptive average pooling matches the teacher's height and width, and a 1x1 convolution
    maps the channels. If either side is a vector, maps are averaged over positions and the adapter is linear.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        maps = len(student_shape) == len(teacher_shape) == 3
        self.size = (teacher_shape[1], teacher_shape[2]) if maps else None
        kind = nn.Linear if self.size is None else _pointwise
        self.change = kind(student_shape[0], teacher_shape[0])

    def forward(self, features: Tensor) -> Tensor:
        """Return adapted features, `(N, D)` or `(N, C, H, W)`, of the same shape as `like` returns."""
        changed: Tensor = self.change(self.resized(features))
        return changed

    def resized(self, features: Tensor) -> Tensor:
        """Return features at the teacher's height and width, or averaged over positions."""
        features = features.float()
        return pooled_features(features) if self.size is None else resized_to(features, self.size)

    def squared_error(self, features: Tensor, rows: Rows | Tensor) -> Tensor:
        """Return the mean squared error `(N,)` of adapted features to rows of their shape."""
        weight, bias = self.change.weight, self.change.bias
        assert bias is not None
        return linear_squared_error(self.resized(features), weight, bias, rows)

    def like(self, features: Tensor) -> Tensor:
        """Return the teacher's features in the shape of the adapter's output."""
        return features if self.size is not None else pooled_features(features)


def _pointwise(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1)


class Hints(nn.Module):
    """Hint loss: the sum over pairs of the mean squared error, per sample."""

    def __init__(self, pairs: Sequence[FeaturePair], *, adapter: str = "linear", seed: int = 0) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        with seeded(seed):
            self.adapters = nn.ModuleList(_adapter(adapter, pair) for pair in pairs)

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student's features and the adapters."""
        total = torch.zeros_like(inputs.student.logits[:, 0], dtype=torch.float32)
        for pair, adapter in zip(self.pairs, self.adapters, strict=True):
            assert isinstance(adapter, (Adapter, Regressor))
            features = inputs.student.features[pair.layer]
            stored = inputs.teachers.features_of(pair.teacher, pair.tap)
            if len(pair.student_shape) < len(pair.teacher_shape):
                stored = adapter.like(teacher_features(inputs, pair))
            if isinstance(adapter, Adapter):
                total = total + adapter.squared_error(features, stored)
            else:
                total = total + squared_error(adapter(features), stored)
        return total


def _adapter(kind: str, pair: FeaturePair) -> Adapter | Regressor:
    if kind == "linear":
        return Adapter(pair.student_shape, pair.teacher_shape)
    return Regressor(pair.student_shape, pair.teacher_shape, relu=True)


def _needs(config: HintConfig) -> Needs:
    coupled = () if config.adapter == "linear" else ("the batch normalization of hint",)
    return Needs(pairs=PairNeeds(config.pairs, config.layers), every_teacher="hints", whole_batch=coupled)


def _build(config: HintConfig, context: BuildContext) -> Hints:
    return Hints(context.pairs, adapter=config.adapter, seed=context.seed)


LOSS = Loss(
    config=HintConfig,
    formula="sum_g mean (u_g(student's layer g) - teacher's layer g)²",
    source="Romero et al. 2015 (FitNets), arXiv 1412.6550, equation 3",
    needs=_needs,
    build=_build,
)
