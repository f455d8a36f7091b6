"""Fused targets of all teachers: weights, adjustments and temperatures, computed once per batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from coursepack.distill.fusion.temperature import SampleTemperatures, fused_logits, sample_temperatures
from coursepack.kernels import MixedLabels, soft_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.distill.fusion.temperature import DynamicTemperatureConfig
    from coursepack.distill.losses.base import LossInputs
    from coursepack.kernels import Rows

STD_EPSILON = 1e-7
"""Constant added to the standard deviation, as in the release of logit standardization."""


@dataclass(frozen=True)
class FusedTargets:
    """Logits of the teachers that are read for a batch, with the weights and temperature that fuse them."""

    logits: Sequence[Tensor | Rows]
    """Logits `(N, C)` of each teacher."""
    labels: Tensor | None
    """Class ids `(N,)`; None if images are mixed."""
    weights: Tensor | None
    """Weights `(N, K)` or `(K,)`, with gradient if the fusion has parameters; None means 1/K."""
    adjustments: tuple[str, ...]
    """Adjustment of each teacher's wrong predictions: none, shift or smooth."""
    smoothing: float
    """Epsilon of the adjustment `smooth`."""
    temperature: float | Tensor
    """Temperature of all samples, or one per sample `(N,)`."""
    temperatures: SampleTemperatures | None
    """Temperatures per sample; None if all samples share one."""
    combine: Literal["mixture", "sum"]
    """Form of the loss for terms with `combine="auto"`: divergence from the mixture, or weighted sum."""
    standardize: bool = False
    """True if `logits` are standardized, and the student's are to be (see `comparable`)."""

    @functools.cached_property
    def probs(self) -> Tensor:
        """Soft targets `(N, C)` of the teachers' mixture at the temperature, detached."""
        return self._mixture(None if self.weights is None else self.weights.detach())

    @functools.cached_property
    def mean_logits(self) -> Tensor:
        """Weighted mean `(N, C)` of the teachers' logits, after the adjustment `shift`, detached."""
        return fused_logits(self.logits, self.weights, self.labels, self.adjustments)

    @functools.cached_property
    def mixture(self) -> Tensor:
        """The same soft targets, with gradient to the teachers' weights if these have one."""
        if self.weights is None or not self.weights.requires_grad:
            return self.probs
        return self._mixture(self.weights)

    def _mixture(self, weights: Tensor | None) -> Tensor:
        return soft_targets(
            self.logits,
            self.labels,
            weights=weights,
            temperature=self.temperature,
            adjustment=self.adjustments,
            smoothing=self.smoothing,
        )

    def comparable(self, student_logits: Tensor) -> Tensor:
        """Return the student's logits in the form of the teachers': standardized if those are."""
        return standardized(student_logits) if self.standardize else student_logits


def standardized(logits: Tensor) -> Tensor:
    """Return `(z - mean) / (std + 1e-7)` of each row, float32 or float64, with the unbiased deviation.

    Sun et al., CVPR 2024, arXiv 2403.01427 (logit standardization). A constant row becomes zero.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide - wide.mean(1, keepdim=True)) / (wide.std(1, keepdim=True) + STD_EPSILON)


def dynamic_temperatures(
    config: DynamicTemperatureConfig,
    base: float,
    inputs: LossInputs,
    weights: Tensor | None,
    adjustments: tuple[str, ...],
) -> SampleTemperatures | None:
    """Return a temperature per sample, or None if all samples share `base`.

    Args:
        config: kind of dynamic temperature, with its settings.
        base: temperature T_0.
        inputs: loss inputs of the batch.
        weights: weights of the teachers, used by the fused teacher of `flsw`.
        adjustments: adjustment of each teacher.
    """
    if config.kind == "none":
        return None
    fused = None
    if config.kind == "flsw":
        labels = None if isinstance(inputs.labels, MixedLabels) else inputs.labels
        with torch.no_grad():
            fused = fused_logits(inputs.teachers.logits, weights, labels, adjustments)
    return sample_temperatures(inputs.student.logits, fused, base=base, **config.model_dump())
