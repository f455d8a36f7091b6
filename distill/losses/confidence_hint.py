"""Feature loss of CA-MKD: hints weighted by how well each teacher's head classifies the adapted features.

    h_k = ReLU(BN(conv(student's map, resized to teacher k's)))
    w_k = (1 - softmax_k CE(head_k(h_k), y)) / (K - 1),   loss = sum_k w_k mean (h_k - f_k)²

Zhang, Chen and Wang, ICASSP 2022, arXiv 2201.00007, and their release. The head is the last linear layer of
teacher k, kept in its store; it is frozen. As in the release, the weights are not detached: their gradient
goes to the student and the adapters. In the release the resized map of one teacher replaces the student's map
for the teachers after it; here every teacher has the student's own map. BN is over the batch, so a sample's
loss depends on its batch.
"""

from __future__ import annotations

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
    TeacherHead,
)
from coursepack.distill.losses.label import cross_entropy
from coursepack.distill.losses.pairs import PairsConfig, teacher_features
from coursepack.errors import RecipeError
from coursepack.models.build import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.kernels import MixedLabels


class ConfidenceHintConfig(PairsConfig):
    """Config of the hint loss weighted by the teachers' heads.

    Pairs default to the last block of each teacher, which its head reads, and of the student.
    """

    term: Literal["confidence_hint"] = "confidence_hint"


class Embed(nn.Module):
    """Learnable map from student features to a teacher's: 1x1 convolution, batch normalization and ReLU.

    The student's map is brought to the teacher's height and width first, by average pooling if it is larger
    and by bilinear interpolation if it is smaller. If either side is a vector, the other is averaged
    over positions and the layer is linear.
    """

    size: tuple[int, int]

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        if len(student_shape) == len(teacher_shape) == 3:
            self.size = (teacher_shape[1], teacher_shape[2])
            self.layer: nn.Conv2d | nn.Linear = nn.Conv2d(student_shape[0], teacher_shape[0], 1)
            self.norm: nn.BatchNorm1d | nn.BatchNorm2d = nn.BatchNorm2d(teacher_shape[0])
        else:
            self.layer = nn.Linear(student_shape[0], teacher_shape[0])
            self.norm = nn.BatchNorm1d(teacher_shape[0])

    def forward(self, features: Tensor) -> Tensor:
        """Return adapted features, `(N, D)` or `(N, C, H, W)`, none negative."""
        if isinstance(self.layer, nn.Conv2d):
            features = _resized(features, self.size)
        elif features.ndim == 4:
            features = features.mean((2, 3))
        adapted: Tensor = self.layer(features)
        if adapted.numel() > adapted.shape[1]:
            normalized: Tensor = self.norm(adapted)
        else:  # one value per channel has no deviation
            normalized = F.batch_norm(
                adapted, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias
            )
        return normalized.relu()


def _resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    if features.shape[2] >= size[0]:
        return F.adaptive_avg_pool2d(features, size)
    return F.interpolate(features, size=size, mode="bilinear")


def _like(adapted: Tensor, teacher_features: Tensor) -> Tensor:
    """Return the teacher's features, averaged over positions if the adapted ones are vectors."""
    return teacher_features if adapted.ndim == teacher_features.ndim else teacher_features.mean((2, 3))


class FrozenHead(nn.Module):
    """Head of a teacher, applied to features of its last block; its weights are not in checkpoints."""

    weight: Tensor
    bias: Tensor

    def __init__(self, head: TeacherHead) -> None:
        super().__init__()
        self.register_buffer("weight", head.weight, persistent=False)
        self.register_buffer("bias", head.bias, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(N, C)` for vectors `(N, D)`, or for maps `(N, D, H, W)` averaged over positions."""
        return F.linear(features if features.ndim == 2 else features.mean((2, 3)), self.weight, self.bias)


def confident_error(
    adapted: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    head_logits: Sequence[Tensor],
    labels: Tensor | MixedLabels,
) -> Tensor:
    """Return the weighted mean squared error `(N,)`, with gradient to all arguments but the labels.

    Args:
        adapted: adapted student features `(N, ...)` for each teacher.
        teacher_features: features of each teacher, of the same shapes.
        head_logits: logits `(N, C)` of each teacher's head for the adapted features.
        labels: class ids `(N,)`, or mixed labels.
    """
    confidence = torch.stack([cross_entropy(logits, labels) for logits in head_logits]).softmax(0)
    weights = (1 - confidence) / (len(adapted) - 1) if len(adapted) > 1 else confidence
    errors = [
        (mine - theirs).square().flatten(1).mean(1)
        for mine, theirs in zip(adapted, teacher_features, strict=True)
    ]
    return (weights * torch.stack(errors)).sum(0)


class ConfidenceHints(nn.Module):
    """Hint loss of all pairs, weighted by the teachers' heads."""

    def __init__(self, pairs: Sequence[FeaturePair], heads: Sequence[TeacherHead], *, seed: int = 0) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.heads = nn.ModuleList(FrozenHead(heads[pair.teacher]) for pair in pairs)
        with seeded(seed):
            self.adapters = nn.ModuleList(Embed(p.student_shape, p.teacher_shape) for p in pairs)

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student's features and the adapters."""
        adapted = [
            adapter(inputs.student.features[pair.layer].float())
            for pair, adapter in zip(self.pairs, self.adapters, strict=True)
        ]
        targets = [
            _like(features, teacher_features(inputs, pair))
            for pair, features in zip(self.pairs, adapted, strict=True)
        ]
        logits = [head(features) for head, features in zip(self.heads, adapted, strict=True)]
        return confident_error(adapted, targets, logits, inputs.labels)


def _needs(config: ConfidenceHintConfig) -> Needs:
    return Needs(
        pairs=PairNeeds(config.pairs, config.layers, choose="last"),
        teacher_heads="the teachers' heads",
        every_teacher="confidence hints",
        whole_batch=("confidence_hint",),
    )


def _build(_config: ConfidenceHintConfig, context: BuildContext) -> ConfidenceHints:
    for pair in context.pairs:
        width = context.heads[pair.teacher].weight.shape[1]
        if pair.teacher_shape[0] != width:
            raise RecipeError(
                f"term 'confidence_hint' applies the head of teacher {pair.teacher}, which reads {width} "
                f"values, to features like tap {pair.tap!r} (shape {pair.teacher_shape}): name the tap of "
                "the layer that the head reads with objective.terms.confidence_hint.pairs"
            )
    return ConfidenceHints(context.pairs, context.heads, seed=context.seed)


LOSS = Loss(
    config=ConfidenceHintConfig,
    formula="sum_k w_k mean (h_k - f_k)², w_k = (1 - softmax_k CE(head_k(h_k), y)) / (K - 1)",
    source="Zhang, Chen and Wang 2022 (CA-MKD), arXiv 2201.00007, and its release",
    needs=_needs,
    build=_build,
)
