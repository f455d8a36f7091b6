"""The fused targets of all teachers: weights, adjustments and temperatures, computed once per batch."""

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


@dataclass(frozen=True)
class FusedTargets:
    """Targets of the teachers that are read for a batch, with everything that makes them one."""

    logits: Sequence[Tensor | Rows]
    """Per teacher `(N, C)`."""
    labels: Tensor | None
    """Class ids `(N,)`; None where images are mixed."""
    weights: Tensor | None
    """`(N, K)` or `(K,)`, with gradient where the fusion learns; None means 1/K."""
    adjustments: tuple[str, ...]
    """Adjustment of each teacher where it is wrong: none, shift or smooth."""
    smoothing: float
    """Epsilon of the adjustment `smooth`."""
    temperature: float | Tensor
    """One for all samples, or `(N,)`."""
    temperatures: SampleTemperatures | None
    """Set where every sample has its own."""
    combine: Literal["mixture", "sum"]
    """Whether divergences are taken from the mixture or summed, where a term leaves it to the fusion."""

    @functools.cached_property
    def probs(self) -> Tensor:
        """Soft targets `(N, C)` of the mixture at the temperature, detached."""
        return soft_targets(
            self.logits,
            self.labels,
            weights=None if self.weights is None else self.weights.detach(),
            temperature=self.temperature,
            adjustment=self.adjustments,
            smoothing=self.smoothing,
        )


def dynamic_temperatures(
    config: DynamicTemperatureConfig,
    base: float,
    inputs: LossInputs,
    weights: Tensor | None,
    adjustments: tuple[str, ...],
) -> SampleTemperatures | None:
    """Return a temperature per sample; None where all share `base`.

    Args:
        config: the kind and its numbers.
        base: T_0.
        inputs: the batch.
        weights: of the teachers, for the fused teacher of `flsw`.
        adjustments: of the teachers.
    """
    if config.kind == "none":
        return None
    fused = None
    if config.kind == "flsw":
        labels = None if isinstance(inputs.labels, MixedLabels) else inputs.labels
        with torch.no_grad():
            fused = fused_logits(inputs.teachers.logits, weights, labels, adjustments)
    return sample_temperatures(inputs.student.logits, fused, base=base, **config.model_dump())
