"""Decoupled knowledge distillation (DKD): the label's class against the rest, and the other classes alone.

Zhao et al., CVPR 2022, arXiv 2203.08679, and its release. KL(P || q) is TCKD + (1 - P_y) NCKD; DKD gives the
two parts weights of their own. Several teachers are compared as one, their mixture, whose non-target part is
weighted by how much each of them leaves to the other classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.distill.losses.label import IGNORED
from coursepack.distill.losses.relation import student_embedding
from coursepack.distill.schedule import NotNegative
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels


class DkdConfig(TermConfig):
    """Config of the decoupled loss."""

    term: Literal["dkd"] = "dkd"
    alpha: NotNegative = 1.0
    """Weight of the divergence between the label's class and the rest (TCKD)."""
    beta: NotNegative = 8.0
    """Weight of the divergence among the other classes (NCKD)."""


class Dkd(nn.Module):
    """Decoupled divergence from the teachers' mixture, per sample."""

    def __init__(self, config: DkdConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)` in nats, with gradient to the student's logits and the teachers' weights.

        The factor T² is applied. A sample whose label is ignored has loss zero.
        """
        soft, labels = inputs.soft, inputs.labels
        if isinstance(labels, MixedLabels):
            raise RecipeError("dkd needs one label per sample, but images are mixed: use a view without mix")
        log_q = student_embedding(soft.comparable(inputs.student.logits), "log_probs", soft.temperature)
        mass = soft.mixture.sum(1)
        target, others = decoupled_divergences(log_q, soft.mixture / mass[:, None], labels.clamp_min(0))
        values: Tensor = self.config.alpha * target + self.config.beta * others
        return (soft.temperature**2 * mass * values).masked_fill(labels == IGNORED, 0)


def decoupled_divergences(log_q: Tensor, teacher_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return TCKD and NCKD, `(N,)` each, in nats.

    Args:
        log_q: log-probabilities of the student `(N, C)`.
        teacher_probs: probabilities `(N, C)` of the teacher; rows sum to one. Where the label has all of it,
            the other classes have no distribution, and NCKD is zero.
        labels: class ids `(N,)`.
    """
    label = labels[:, None]
    p_label, p_others = teacher_probs.gather(1, label)[:, 0], teacher_probs.scatter(1, label, 0.0)
    p_rest = p_others.sum(1)
    log_q_label = log_q.gather(1, label)[:, 0]
    log_q_rest = log_q.scatter(1, label, -torch.inf).logsumexp(1)
    target = _p_log_p(p_label) - p_label * log_q_label + _p_log_p(p_rest) - p_rest * log_q_rest
    among = p_others / p_rest.clamp_min(torch.finfo(p_rest.dtype).tiny)[:, None]
    others = (_p_log_p(among) - among * (log_q - log_q_rest[:, None])).sum(1)
    return target, others


def _p_log_p(p: Tensor) -> Tensor:
    """Return `p log p`, with log p clamped at the smallest normal number, so that gradients are finite."""
    return p * p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _needs(_config: DkdConfig) -> Needs:
    return Needs(fused=True, labels=True, one_label="term 'dkd' separates the label's class from the rest")


def _build(config: DkdConfig, _context: BuildContext) -> Dkd:
    return Dkd(config)


LOSS = Loss(
    config=DkdConfig,
    formula="T² (alpha KL((P_y, 1 - P_y) || (q_y, 1 - q_y)) + beta KL(P without y || q without y)), "
    "P = sum_k w_k P_k",
    source="Zhao et al. 2022 (DKD), arXiv 2203.08679",
    needs=_needs,
    build=_build,
)
