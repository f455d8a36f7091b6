"""The objective of a student: a weighted sum of named terms.

A term gives one value per sample, `(N,)`. The objective takes their mean over the batch (the field's
`batchmean`) and adds them up; weights and the reduction live here and nowhere else. The factor T² lives in
`coursepack.kernels.soft_target_loss` (docs/decisions/reduction.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coursepack.config import Config
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels, soft_target_loss

if TYPE_CHECKING:
    from coursepack.distill.targets import Targets

Weight = Annotated[float, Field(ge=0)]


class ObjectiveConfig(Config):
    """Numbers of the terms. A method is a named choice of them."""

    soft_weight: Weight = 0.0
    """Factor of T² D(teachers || student)."""
    hard_weight: Weight = 1.0
    """Factor of the cross-entropy to the labels."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 4.0
    """T of teachers and student."""
    adjustment: Literal["none", "shift", "smooth"] = "none"
    """What to do with a teacher that is wrong."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Epsilon of the adjustment `smooth`."""
    combine: Literal["mixture", "sum"] = "mixture"
    """Divergence of the teachers' mixture, or weighted sum of divergences."""
    teacher_weights: tuple[Weight, ...] | None = None
    """One per teacher, in the order of the stores; none means equal weights that sum to one."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """What it needs of every store."""
        return ("logits",) if self.soft_weight > 0 else ()


@dataclass(frozen=True)
class ObjectiveValue:
    """What an objective says about a batch."""

    loss: Tensor
    """The sum of all terms, a scalar with gradient."""
    terms: dict[str, Tensor]
    """Each term's share of it, scalars without gradient."""


class SoftTargetTerm(nn.Module):
    """Fused soft targets of all teachers, with the cross-entropy in the same pass."""

    weights: Tensor | None

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        weights = None if config.teacher_weights is None else torch.tensor(config.teacher_weights)
        self.register_buffer("weights", weights, persistent=False)

    def forward(
        self, student_logits: Tensor, labels: Tensor | MixedLabels, targets: Targets | None
    ) -> Tensor:
        """Loss `(N,)`."""
        if targets is None:
            raise RecipeError("this objective needs teachers, but was given no targets")
        return soft_target_loss(
            student_logits,
            targets.logits,
            labels,
            weights=self.weights,
            temperature=self.config.temperature,
            adjustment=self.config.adjustment,
            smoothing=self.config.smoothing,
            combine=self.config.combine,
            soft_weight=self.config.soft_weight,
            hard_weight=self.config.hard_weight,
        )


class CrossEntropyTerm(nn.Module):
    """Cross-entropy to the labels alone."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.weight = config.hard_weight

    def forward(
        self, student_logits: Tensor, labels: Tensor | MixedLabels, _targets: Targets | None
    ) -> Tensor:
        """Loss `(N,)`."""
        logits = student_logits.float()
        if not isinstance(labels, MixedLabels):
            return self.weight * F.cross_entropy(logits, labels, reduction="none")
        first, second = (
            F.cross_entropy(logits, ids, reduction="none") for ids in (labels.first, labels.second)
        )
        return self.weight * (labels.lam * first + (1 - labels.lam) * second)


class Objective(nn.Module):
    """The weighted sum of a config's terms."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        if config.soft_weight > 0:
            self.terms = nn.ModuleDict({"soft_target": SoftTargetTerm(config)})
        else:
            self.terms = nn.ModuleDict({"cross_entropy": CrossEntropyTerm(config)})

    def forward(
        self, student_logits: Tensor, labels: Tensor | MixedLabels, targets: Targets | None
    ) -> ObjectiveValue:
        """Value on one batch.

        Args:
            student_logits: `(N, C)`.
            labels: `(N,)` int64, or two and a share where images are mixed.
            targets: what the teachers say; None where no term needs them.
        """
        means = {name: term(student_logits, labels, targets).mean() for name, term in self.terms.items()}
        return ObjectiveValue(
            loss=torch.stack(list(means.values())).sum(),
            terms={name: value.detach() for name, value in means.items()},
        )
