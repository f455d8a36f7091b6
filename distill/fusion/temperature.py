"""Dynamic temperature: a temperature per sample, lower where the student is confused.

    T_x = T_0 + slope (mean_j omega_j - omega_x),   clamped to [lowest, highest]

Wen, Lai and Qian 2019, arXiv 1911.07471 (DTD). Temperatures have no gradient. The mean is over the batch, so
a sample's loss depends on its batch: the term is batch-coupled. `soft_target_loss` multiplies by T_x² inside
the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from coursepack.config import Config
from coursepack.distill.losses.base import Needs
from coursepack.distill.schedule import NotNegative, Temperature
from coursepack.kernels import decode, shift_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.kernels import Rows

NORM_EPSILON = 1e-4
PROB_EPSILON = 1e-3
"""Constants added to the norm of the logits and to the largest probability, as in TextBrewer."""


class DynamicTemperatureConfig(Config):
    """Config of the temperature per sample; the objective's `temperature` is T_0."""

    kind: Literal["none", "flsw", "cwsm"] = "none"
    """Definition of omega, see `flsw_omega` and `cwsm_omega`; `none` means one temperature for all."""
    slope: NotNegative = 1.0
    """Slope of the temperature in omega (beta in the paper); with 0 every sample has T_0."""
    gamma: NotNegative = 1.0
    """Exponent gamma of FLSW."""
    lowest: Temperature = 1.0
    """Lower bound of T_x."""
    highest: Temperature = 20.0
    """Upper bound of T_x."""

    def needs(self) -> Needs:
        """Return the needs: FLSW reads all logits of the teachers, and both kinds couple the samples."""
        if self.kind == "none":
            return Needs()
        return Needs(dense_logits="FLSW" if self.kind == "flsw" else "", whole_batch=("dynamic_temperature",))


@dataclass(frozen=True)
class SampleTemperatures:
    """Temperatures per sample of a batch, without gradient."""

    values: Tensor
    """Temperatures T_x `(N,)` float32."""
    clamped: Tensor
    """Mask `(N,)` of the samples whose temperature was clamped to a bound."""


def flsw_omega(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> Tensor:
    """Return `(1 - cos(v, t))^gamma`, `(N,)`, the distance between the directions of two logit vectors.

    Args:
        student_logits: logits v `(N, C)`.
        teacher_logits: logits t `(N, C)` of the fused teacher.
        gamma: exponent, as in the focal loss.
    """
    student, teacher = (
        logits / (logits.norm(dim=1, keepdim=True) + NORM_EPSILON)
        for logits in (student_logits, teacher_logits)
    )
    distance: Tensor = (1 - (student * teacher).sum(1)).clamp_min(0) ** gamma
    return distance


def cwsm_omega(student_logits: Tensor) -> Tensor:
    """Return `1 / max_c softmax(v)_c`, `(N,)`, the student's uncertainty."""
    return 1 / (student_logits.softmax(1).amax(1) + PROB_EPSILON)


def fused_logits(
    teachers: Sequence[Tensor | Rows],
    weights: Tensor | None,
    labels: Tensor | None = None,
    adjustments: Sequence[str] = (),
) -> Tensor:
    """Return the weighted mean `(N, C)` of the teachers' logits, after the adjustment "shift" (KA-PS).

    FLSW compares the student with this fused teacher. The adjustment "smooth" (KA-LSR) is not defined on
    logits, so logits of such teachers are used unadjusted.

    Args:
        teachers: logits `(N, C)` of each of the K teachers.
        weights: weights `(K,)` or `(N, K)`; None means 1/K.
        labels: class ids `(N,)`, required by "shift".
        adjustments: adjustment of each teacher; empty means none.
    """
    weighted, shares = [], []
    for index, teacher in enumerate(teachers):
        logits = decode(teacher).detach()
        if adjustments and adjustments[index] == "shift" and labels is not None:
            logits = shift_logits(logits, labels)
        share = torch.ones_like(logits[:, 0]) if weights is None else weights.detach()[..., index]
        weighted.append(share.reshape(-1, 1) * logits)
        shares.append(share.reshape(-1, 1))
    return torch.stack(weighted).sum(0) / torch.stack(shares).sum(0).clamp_min(1e-12)


@torch.no_grad()
def sample_temperatures(
    student_logits: Tensor,
    fused: Tensor | None,
    *,
    kind: str,
    base: float,
    slope: float,
    gamma: float,
    lowest: float,
    highest: float,
) -> SampleTemperatures:
    """Return `T_0 + slope (mean(omega) - omega_x)`, clamped to the bounds.

    Args:
        student_logits: logits `(N, C)`.
        fused: logits `(N, C)` of the fused teacher, required by `flsw`.
        kind: `flsw` or `cwsm`.
        base: temperature T_0.
        slope: slope in omega.
        gamma: exponent of `flsw`.
        lowest: lower bound of the temperatures.
        highest: upper bound of the temperatures.
    """
    logits = student_logits.detach().float()
    if kind == "cwsm":
        omega = cwsm_omega(logits)
    elif fused is None:
        raise ValueError("flsw compares the student with teachers, but fused is None")
    else:
        omega = flsw_omega(logits, fused.float(), gamma)
    unclamped = base + slope * (omega.mean() - omega)
    values = unclamped.clamp(lowest, highest)
    return SampleTemperatures(values, values != unclamped)
