"""Cross-entropy to the labels, or to the uniform distribution for label smoothing."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.kernels import MixedLabels

IGNORED = -100
"""Label of samples without a class, which have loss zero, as in torch."""


class LabelConfig(TermConfig):
    """Config of the cross-entropy term."""

    term: Literal["label"] = "label"
    target: Literal["label", "uniform"] = "label"
    """Target distribution: `label` for the labels, `uniform` for the uniform distribution over the classes,
    which is the smoothing part of label smoothing (Szegedy et al. 2016, arXiv 1512.00567)."""


class Label(nn.Module):
    """Cross-entropy of the student to hard or mixed labels, or to the uniform distribution."""

    def __init__(self, config: LabelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)` in nats, with gradient to the student's logits."""
        loss = cross_entropy if self.config.target == "label" else uniform_cross_entropy
        return loss(inputs.student.logits, inputs.labels)


def cross_entropy(student_logits: Tensor, labels: Tensor | MixedLabels) -> Tensor:
    """Return the cross-entropy `(N,)` to hard or mixed labels, float32, nats."""
    logits = student_logits.float()
    if not isinstance(labels, MixedLabels):
        return F.cross_entropy(logits, labels, reduction="none")
    first, second = (F.cross_entropy(logits, ids, reduction="none") for ids in (labels.first, labels.second))
    return labels.lam * first + (1 - labels.lam) * second


def uniform_cross_entropy(student_logits: Tensor, labels: Tensor | MixedLabels) -> Tensor:
    """Return the cross-entropy `(N,)` to the uniform distribution, float32, nats; 0 for label `IGNORED`."""
    logits = student_logits.float()
    values = logits.logsumexp(1) - logits.mean(1)
    return values if isinstance(labels, MixedLabels) else values.masked_fill(labels == IGNORED, 0)


def _needs(config: LabelConfig) -> Needs:
    return Needs(labels=config.target == "label")


def _build(config: LabelConfig, _context: BuildContext) -> Label:
    return Label(config)


LOSS = Loss(
    config=LabelConfig,
    formula="CE(z, y)",
    source="cross-entropy; mixed labels are weighted by their shares",
    needs=_needs,
    build=_build,
)
