"""DIST: correlations between the soft targets of student and teacher, within samples and within classes.

Huang et al., NeurIPS 2022, arXiv 2205.10536, and its release. Only the linear relation of the probabilities
counts, not their scale. Several teachers are compared as one, their mixture; correlations within a class have
one value per batch, so weights per sample have no other meaning there.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.distill.losses.relation import student_embedding
from coursepack.distill.schedule import NotNegative

EPSILON = 1e-8
"""Constant added to the product of the norms, as in the release."""


class DistConfig(TermConfig):
    """Config of the correlation loss."""

    term: Literal["dist"] = "dist"
    beta: NotNegative = 1.0
    """Weight of the correlation between the classes of a sample (inter-class relation)."""
    gamma: NotNegative = 1.0
    """Weight of the correlation between the samples of a batch, per class (intra-class relation)."""


class Dist(nn.Module):
    """Correlation loss between the student's probabilities and the teachers' mixture."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student's logits and the teachers' weights.

        The factor T² is applied. The intra-class part is the same for all samples.
        """
        config, soft = self.config, inputs.soft
        probs = student_embedding(soft.comparable(inputs.student.logits), "probs", soft.temperature)
        inter = 1 - correlation(probs, soft.mixture, 1)
        intra = 1 - correlation(probs, soft.mixture, 0).mean()
        value: Tensor = soft.temperature**2 * (config.beta * inter + config.gamma * intra)
        return value


def correlation(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Return Pearson's correlation of two matrices along a dimension; 0 where one of them is constant."""
    student, teacher = (values - values.mean(dim, keepdim=True) for values in (student, teacher))
    norms = student.norm(dim=dim) * teacher.norm(dim=dim)
    correlations: Tensor = (student * teacher).sum(dim) / (norms + EPSILON)
    return correlations


def _needs(config: DistConfig) -> Needs:
    return Needs(fused=True, whole_batch=(config.term,) if config.gamma else ())


def _build(config: DistConfig, _context: BuildContext) -> Dist:
    return Dist(config)


LOSS = Loss(
    config=DistConfig,
    formula="T² (beta mean_n (1 - corr_c(q_n, P_n)) + gamma mean_c (1 - corr_n(q_c, P_c))), "
    "P = sum_k w_k P_k",
    source="Huang et al. 2022 (DIST), arXiv 2205.10536",
    needs=_needs,
    build=_build,
)
