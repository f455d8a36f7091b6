"""Divergence from a virtual teacher that is always right (Tf-KD): it reads labels and no teacher.

Yuan et al., CVPR 2020, arXiv 1909.11723, equations 8 and 9: the teacher gives the label probability a and
every other class an equal share, and both sides are softened by the same temperature; there is no factor T².
At T = 1 the gradient is that of label smoothing with epsilon = (1 - a) C / (C - 1).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.distill.losses.label import IGNORED
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels

Softening = Literal["both", "double_softmax"]


class VirtualTeacherConfig(TermConfig):
    """Config of the divergence from a virtual teacher."""

    term: Literal["virtual_teacher"] = "virtual_teacher"
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Probability a that the virtual teacher gives to the label, before it is softened."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 20.0
    """Temperature of the virtual teacher and the student."""
    softening: Softening = "both"
    """`both`: teacher and student at the temperature, as in the paper. `double_softmax`: the softmax of the
    teacher's probabilities over the temperature, nearly uniform, and the student at T = 1, as in the
    release."""


class VirtualTeacher(nn.Module):
    """Divergence from a virtual teacher, per sample."""

    def __init__(self, config: VirtualTeacherConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)` in nats, with gradient to the student's logits.

        Mixed labels are weighted by their shares. A sample whose label is ignored has loss zero.
        """
        config, logits, labels = self.config, inputs.student.logits.float(), inputs.labels
        p_label, p_other = virtual_probs(
            logits.shape[1], config.confidence, config.temperature, config.softening
        )
        if config.softening == "both":
            logits = logits / config.temperature
        log_q = logits.log_softmax(1)
        if not isinstance(labels, MixedLabels):
            return _divergence(log_q, p_label, p_other, labels)
        first, second = (_divergence(log_q, p_label, p_other, ids) for ids in (labels.first, labels.second))
        return labels.lam * first + (1 - labels.lam) * second


def virtual_probs(
    classes: int, confidence: float, temperature: float, softening: Softening
) -> tuple[float, float]:
    """Return the softened probabilities of the virtual teacher: of the label, and of each other class.

    >>> virtual_probs(4, 0.7, 1.0, "both")
    (0.7, 0.1)
    """
    probs = (confidence, (1 - confidence) / (classes - 1))
    if softening == "both":
        label, other = (math.exp(math.log(p) / temperature) for p in probs)
    else:
        label, other = (math.exp(p / temperature) for p in probs)
    total = label + (classes - 1) * other
    return label / total, other / total


def _divergence(log_q: Tensor, p_label: float, p_other: float, labels: Tensor) -> Tensor:
    log_q_label = log_q.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    others = log_q.shape[1] - 1
    negative_entropy = p_label * math.log(p_label) + others * p_other * math.log(p_other)
    cross = p_label * log_q_label + p_other * (log_q.sum(1) - log_q_label)
    return (negative_entropy - cross).masked_fill(labels == IGNORED, 0)


def _needs(_config: VirtualTeacherConfig) -> Needs:
    return Needs(labels=True)


def _build(config: VirtualTeacherConfig, context: BuildContext) -> VirtualTeacher:
    if context.classes == 1:
        raise RecipeError("loss 'virtual_teacher' needs at least two classes, the source has one")
    return VirtualTeacher(config)


LOSS = Loss(
    config=VirtualTeacherConfig,
    formula="KL(v_T || q_T), v = a for y and (1 - a) / (C - 1) for each other class, "
    "v_T = v^(1/T) normalized",
    source="Yuan et al. 2020 (Tf-KD), arXiv 1909.11723, equations 8 and 9",
    needs=_needs,
    build=_build,
)
