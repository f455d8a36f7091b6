"""Divergence from the targets that the exchange between students makes for each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.kernels import soft_target_loss

if TYPE_CHECKING:
    from torch import Tensor


class MutualConfig(TermConfig):
    """Config of the divergence from peers."""

    term: Literal["mutual"] = "mutual"
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Temperature of both sides."""
    divergence: Literal["kl", "reverse_kl"] = "kl"
    """`kl` is KL(target || student), and `reverse_kl` is KL(student || target)."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean or sum over the targets."""


class Mutual(nn.Module):
    """Mean over the targets of T² D(target || student)."""

    def __init__(self, config: MutualConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor | None:
        """Return the mean loss in nats, with gradient to the student's logits; None without targets.

        Targets that are not detached receive a gradient too.
        """
        config, targets = self.config, inputs.peers
        if not targets:
            return None
        logits = inputs.student.logits
        if any(target.requires_grad for target in targets):
            loss = torch.stack([self._with_gradient(target, logits) for target in targets]).mean()
        else:
            loss = soft_target_loss(
                logits,
                list(targets),
                temperature=config.temperature,
                combine="sum",
                divergence=config.divergence,
                reduction="mean",
            )
        return loss * len(targets) if config.reduction == "sum" else loss

    def _with_gradient(self, target: Tensor, logits: Tensor) -> Tensor:
        temperature = self.config.temperature
        log_p, log_q = (target / temperature).log_softmax(1), (logits / temperature).log_softmax(1)
        if self.config.divergence == "reverse_kl":
            log_p, log_q = log_q, log_p
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)


def _needs(_config: MutualConfig) -> Needs:
    return Needs(peers="mutual")


def _build(config: MutualConfig, _context: BuildContext) -> Mutual:
    return Mutual(config)


LOSS = Loss(
    config=MutualConfig,
    formula="mean_j T² KL(p_j || q) over the targets j that the exchange gives",
    source="Zhang et al. 2018 (DML), arXiv 1706.00384, equations 5 to 7",
    needs=_needs,
    build=_build,
)
