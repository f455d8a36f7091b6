"""Monitored teachers: a teacher counts for a sample only if it is right, or better than the student.

Labels decide. Teachers that count for a sample share it equally; a sample for which none counts is trained on
its label alone, with the objective's hard weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.distill.fusion.weights import label_cross_entropy
from coursepack.distill.losses.base import Needs
from coursepack.distill.losses.label import cross_entropy
from coursepack.kernels import MixedLabels, teacher_stats

if TYPE_CHECKING:
    from torch import Tensor

    from coursepack.distill.fusion.base import Weigh
    from coursepack.distill.losses.base import BuildContext, LossInputs


class MonitoredConfig(FusionConfig):
    """Config of teachers that count for some samples only."""

    name: Literal["monitored"] = "monitored"
    rule: Literal["right", "better"] = "right"
    """Samples for which a teacher counts. `right`: its largest logit is the label's. `better`: its
    cross-entropy to the label, which may be mixed, is lower at T = 1 than the student's."""


def monitored_weights(counts: Tensor) -> Tensor:
    """Return weights `(N, K)` float32: equal shares of the teachers that count, zero if none does.

    Args:
        counts: mask `(N, K)` of the teachers that count for each sample.
    """
    return counts.float() / counts.sum(1, keepdim=True).clamp_min(1)


@torch.no_grad()
def counting_teachers(rule: str, inputs: LossInputs) -> Tensor:
    """Return the mask `(N, K)` of the teachers that count; no teacher counts for a sample without a label."""
    if rule == "better":
        student = cross_entropy(inputs.student.logits, inputs.labels)
        return (label_cross_entropy(inputs) < student).T
    assert not isinstance(inputs.labels, MixedLabels)
    correct = teacher_stats(inputs.teachers.logits, inputs.labels).correct
    assert correct is not None
    return correct.T


def _needs(config: MonitoredConfig) -> Needs:
    right = "fusion 'monitored' counts teachers that are right (rule=better takes mixed labels)"
    return Needs(labels=True, one_label=right if config.rule == "right" else "")


def _build(config: MonitoredConfig, _context: BuildContext) -> Weigh:
    return lambda inputs: monitored_weights(counting_teachers(config.rule, inputs))


MONITORED = Fusion(
    config=MonitoredConfig,
    formula="w_k = c_k / max(1, sum_j c_j), c_k = 1 if argmax z_k = y (rule better: CE(z_k, y) < CE(z, y))",
    source="teachers monitored by the labels",
    combine="sum",
    build=_build,
    needs=_needs,
    abstains=True,
)
