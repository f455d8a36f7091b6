"""Methods: named objectives, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from coursepack.distill.objective import ObjectiveConfig


@dataclass(frozen=True)
class Method:
    """A named objective that can be overridden field by field."""

    summary: str
    """Its loss in one line."""
    citation: str
    """Paper and place."""
    objective: ObjectiveConfig
    """Its defaults."""


METHODS = {
    "supervised": Method(
        summary="CE(student, labels)",
        citation="no teacher",
        objective=ObjectiveConfig(soft_weight=0.0, hard_weight=1.0),
    ),
    "kd": Method(
        summary="0.9 T² KL(sum_k w_k softmax(z_k / T) || softmax(z / T)) + 0.1 CE, T = 4",
        citation="Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2; weights of Tian et al. 2020",
        objective=ObjectiveConfig(soft_weight=0.9, hard_weight=0.1, temperature=4.0),
    ),
}
