"""Fusions without parameters: fixed weights, or weights computed from teachers' logits and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from coursepack.data.randomness import Purpose, below, random_words
from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.distill.losses.base import Needs
from coursepack.distill.schedule import NotNegative
from coursepack.kernels import MixedLabels, teacher_stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.distill.fusion.base import Weigh
    from coursepack.distill.losses.base import BuildContext, LossInputs, Step


class FixedConfig(FusionConfig):
    """Config of constant weights."""

    name: Literal["fixed"] = "fixed"
    weights: tuple[NotNegative, ...] | None = None
    """Weight of each teacher, in the order of the stores; defaults to 1/K each. Weights are not normalized,
    so their sum scales the soft-target gradient."""

    @field_validator("weights")
    @classmethod
    def _not_all_zero(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and not any(weights):
            raise ValueError("teacher weights are all zero: give at least one teacher a weight above zero")
        return weights

    def refusal(self, teachers: int) -> str:
        """Return an error if the number of weights is not the number of teachers."""
        if self.weights is None or len(self.weights) == teachers:
            return ""
        return f"fusion.weights has {len(self.weights)} numbers, expected {teachers}: one per store"


class UniformConfig(FusionConfig):
    """Config of equal weights with summed divergences."""

    name: Literal["uniform"] = "uniform"


class BestConfig(FusionConfig):
    """Config of the fusion that reads the same single teacher for all batches."""

    name: Literal["best"] = "best"
    teacher: Annotated[int, Field(ge=0)] | None = None
    """Index of the teacher's store; defaults to the teacher with the highest accuracy recorded in its
    store."""

    def refusal(self, teachers: int) -> str:
        """Return an error if the teacher does not exist."""
        if self.teacher is None or self.teacher < teachers:
            return ""
        return f"fusion.teacher is {self.teacher}, but there are {teachers} stores: indices begin at 0"


class RandomConfig(FusionConfig):
    """Config of the fusion that draws one teacher per batch at random."""

    name: Literal["random"] = "random"


class ConfidenceConfig(FusionConfig):
    """Config of weights that decrease with each teacher's cross-entropy to the label."""

    name: Literal["confidence"] = "confidence"


class EntropyConfig(FusionConfig):
    """Config of weights that decrease with each teacher's entropy."""

    name: Literal["entropy"] = "entropy"


class Fixed(nn.Module):
    """Constant weights."""

    weights: Tensor | None

    def __init__(self, weights: tuple[float, ...] | None) -> None:
        super().__init__()
        given = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("weights", given, persistent=False)

    def forward(self, _inputs: LossInputs) -> Tensor | None:
        """Return weights `(K,)`, or None for 1/K."""
        return self.weights


def confidence_weights(cross_entropy: Tensor) -> Tensor:
    """Return CA-MKD's weights `w_k = (1 - softmax_k(CE_k)) / (K - 1)`, `(N, K)`; 1 for a single teacher.

    Args:
        cross_entropy: cross-entropy `(K, N)` of each teacher to the label at T = 1, in nats.

    Zhang, Chen and Wang, ICASSP 2022, arXiv 2201.00007, equation 2.
    """
    return _complementary_weights(cross_entropy.softmax(0))


def entropy_weights(entropy: Tensor) -> Tensor:
    """Return EBKD's weights `w_k = (1 - H_k / sum_j H_j) / (K - 1)`, `(N, K)`; 1 for a single teacher.

    Args:
        entropy: entropy `(K, N)` of each teacher at T = 1, in nats. If all are zero, weights are equal.

    Kwon et al. 2020, as in the release of CA-MKD. The release omits the K - 1, so its weights sum to K - 1.
    """
    total = entropy.sum(0)
    share = torch.where(total > 0, entropy / total, 1 / len(entropy))
    return _complementary_weights(share)


def _complementary_weights(share: Tensor) -> Tensor:
    """Return weights `(N, K)`, proportional to one minus each teacher's share `(K, N)`, that sum to one."""
    if len(share) == 1:
        return torch.ones_like(share).T
    return ((1 - share) / (len(share) - 1)).T


def label_cross_entropy(inputs: LossInputs) -> Tensor:
    """Return each teacher's cross-entropy to the (mixed) labels at T = 1, `(K, N)` nats."""

    def to(labels: Tensor) -> Tensor:
        values = teacher_stats(inputs.teachers.logits, labels).cross_entropy
        assert values is not None
        return values

    if isinstance(inputs.labels, MixedLabels):
        lam = inputs.labels.lam
        return lam * to(inputs.labels.first) + (1 - lam) * to(inputs.labels.second)
    return to(inputs.labels)


def best_teacher(config: BestConfig, context: BuildContext, _step: Step) -> int:
    """Return the configured index, or that of the most accurate teacher; the first one wins ties."""
    return int(np.argmax(context.accuracies)) if config.teacher is None else config.teacher


def random_teacher(_config: RandomConfig, context: BuildContext, step: Step) -> int:
    """Return the index of a teacher drawn from (seed, epoch, batch)."""
    words = random_words(context.seed, np.array([step.batch]), step.epoch, Purpose.TEACHER)
    return int(below(words[:, 0], context.teachers)[0])


def _rule(weigh: Weigh) -> Callable[[Any, BuildContext], Weigh]:
    return lambda _config, _context: weigh


_equal = _rule(lambda _inputs: None)

FIXED = Fusion(
    config=FixedConfig,
    formula="w_k as given in fusion.weights; 1/K if none are",
    source="Hinton, Vinyals and Dean 2015, arXiv 1503.02531",
    combine="mixture",
    build=lambda config, _context: Fixed(config.weights),
)
UNIFORM = Fusion(
    config=UniformConfig,
    formula="w_k = 1/K",
    source="mean of divergences, as AVER in the release of CA-MKD",
    combine="sum",
    build=_equal,
)
BEST = Fusion(
    config=BestConfig,
    formula="w_k = 1 for one teacher; the others are not read",
    source="the usual single-teacher baseline",
    combine="mixture",
    build=_equal,
    choose=best_teacher,
    constant=True,
)
RANDOM = Fusion(
    config=RandomConfig,
    formula="w_k = 1 for one teacher, drawn anew for every batch; the others are not read",
    source="Shen, He and Xue 2019 (MEAL), arXiv 1812.02425, section 3",
    combine="mixture",
    build=_equal,
    choose=random_teacher,
    every_batch=True,
)
CONFIDENCE = Fusion(
    config=ConfidenceConfig,
    formula="w_k = (1 - softmax_k(CE(z_k, y))) / (K - 1)",
    source="Zhang, Chen and Wang 2022 (CA-MKD), arXiv 2201.00007, equation 2",
    combine="sum",
    build=_rule(lambda inputs: confidence_weights(label_cross_entropy(inputs))),
    needs=lambda _config: Needs(labels=True),
)
ENTROPY = Fusion(
    config=EntropyConfig,
    formula="w_k = (1 - H_k / sum_j H_j) / (K - 1)",
    source="Kwon et al. 2020 (EBKD), as in the release of CA-MKD",
    combine="sum",
    build=_rule(lambda inputs: entropy_weights(teacher_stats(inputs.teachers.logits).entropy)),
)
