"""Soft-target loss: divergence from the fused teachers, with the cross-entropy in the same kernel call.

Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2. The factor T² is applied inside
`coursepack.kernels.soft_target_loss` (docs/decisions/reduction.md).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.distill.losses.label import cross_entropy
from coursepack.distill.schedule import Weight, is_used, value_at
from coursepack.kernels import soft_target_loss

Divergence = Literal["kl", "reverse_kl", "js", "mse"]


class SoftTargetConfig(TermConfig):
    """Config of the soft-target loss."""

    term: Literal["soft_target"] = "soft_target"
    hard_weight: Weight = 0.0
    """Weight of the cross-entropy to the labels, or its schedule over epochs."""
    divergence: Divergence = "kl"
    """Divergence of the student from the soft targets, see `coursepack.kernels.soft_target_loss`."""
    combine: Literal["auto", "mixture", "sum"] = "auto"
    """Divergence from the mixture of teachers, or weighted sum of divergences; auto takes the published form
    of the fusion."""


class SoftTarget(nn.Module):
    """Weighted divergence from the fused teachers plus weighted cross-entropy."""

    def __init__(self, config: SoftTargetConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss in nats, `(N,)` or its mean, with gradient to logits and teachers' weights."""
        config, soft, epoch = self.config, inputs.soft, inputs.step.epoch
        hard_weight = value_at(config.hard_weight, epoch)
        hard_apart = bool(soft.standardize and hard_weight)
        loss = soft_target_loss(
            soft.comparable(inputs.student.logits),
            soft.logits,
            inputs.labels,
            weights=soft.weights,
            temperature=soft.temperature,
            adjustment=soft.adjustments,
            smoothing=soft.smoothing,
            combine=soft.combine if config.combine == "auto" else config.combine,
            soft_weight=value_at(config.weight, epoch),
            hard_weight=0.0 if soft.standardize else hard_weight,
            divergence=config.divergence,
            reduction="none" if hard_apart else "mean",
        )
        if hard_apart:
            loss = loss + hard_weight * cross_entropy(inputs.student.logits, inputs.labels)
        return loss

    def without_teachers(self, inputs: LossInputs) -> Tensor:
        """Return the weighted cross-entropy `(N,)` alone, in a phase that reads no teacher."""
        hard_weight = value_at(self.config.hard_weight, inputs.step.epoch)
        return hard_weight * cross_entropy(inputs.student.logits, inputs.labels)


def _needs(config: SoftTargetConfig) -> Needs:
    return Needs(fused=True, labels=is_used(config.hard_weight))


def _build(config: SoftTargetConfig, _context: BuildContext) -> SoftTarget:
    return SoftTarget(config)


LOSS = Loss(
    config=SoftTargetConfig,
    formula="weight T² D(sum_k w_k P_k || q) + hard_weight CE(z, y)",
    source="Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2",
    needs=_needs,
    build=_build,
    applies_weight=True,
)
