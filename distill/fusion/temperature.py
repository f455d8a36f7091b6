"""Dynamic temperature: every sample has its own, lower where the student is confused.

    T_x = T_0 + slope (mean_j omega_j - omega_x),   clamped to [lowest, highest]

Wen, Lai and Qian 2019, arXiv 1911.07471 (DTD). Without gradient. The mean is over the batch, so a sample's
loss depends on its batch: the term is batch-coupled. `soft_target_loss` multiplies by T_x² inside the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from coursepack.config import Config
from coursepack.distill.losses.base import Needs
from coursepack.distill.schedule import NotNegative
from coursepack.kernels import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from coursepack.kernels import Rows

NORM_EPSILON = 1e-4
PROB_EPSILON = 1e-3
"""Added to the norm of logits and to the largest probability, as TextBrewer does."""

Temperature = Annotated[float, Field(gt=0, le=100)]


class DynamicTemperatureConfig(Config):
    """Numbers of a temperature per sample; the objective's `temperature` is T_0."""

    kind: Literal["none", "flsw", "cwsm"] = "none"
    """What omega is: see `flsw_omega` and `cwsm_omega`."""
    slope: NotNegative = 1.0
    """Beta; with zero every sample has T_0, clamped like any T_x."""
    gamma: NotNegative = 1.0
    """Exponent of FLSW."""
    lowest: Temperature = 1.0
    """Lower bound of T_x."""
    highest: Temperature = 20.0
    """Upper bound of T_x."""

    def needs(self) -> Needs:
        """Return the needs of the kind: FLSW compares all logits; both relate the samples of a batch."""
        if self.kind == "none":
            return Needs()
        return Needs(dense_logits="FLSW" if self.kind == "flsw" else "", whole_batch=("dynamic_temperature",))


@dataclass(frozen=True)
class SampleTemperatures:
    """Temperatures of a batch, without gradient."""

    values: Tensor
    """T_x `(N,)` float32."""
    clamped: Tensor
    """`(N,)` bool: where a bound was hit."""


def flsw_omega(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> Tensor:
    """`(1 - cos(v, t))^gamma`, `(N,)`: how far the student's direction is from the teacher's.

    Args:
        student_logits: `(N, C)`.
        teacher_logits: `(N, C)`, of the fused teacher.
        gamma: exponent, as in the focal loss.
    """
    student, teacher = (
        logits / (logits.norm(dim=1, keepdim=True) + NORM_EPSILON)
        for logits in (student_logits, teacher_logits)
    )
    apart: Tensor = (1 - (student * teacher).sum(1)).clamp_min(0) ** gamma
    return apart


def cwsm_omega(student_logits: Tensor) -> Tensor:
    """`1 / max_c softmax(v)_c`, `(N,)`: how unsure the student is."""
    return 1 / (student_logits.softmax(1).amax(1) + PROB_EPSILON)


def fused_logits(
    teachers: Sequence[Tensor | Rows],
    weights: Tensor | None,
    labels: Tensor | None = None,
    adjustments: Sequence[str] = (),
) -> Tensor:
    """Logits `(N, C)` of several teachers as one: their weighted mean, after KA-PS where that is asked.

    This is the fused teacher that FLSW compares the student with; for one teacher it is that teacher. KA-LSR
    has no logits, so a teacher that it replaces counts as it is.

    Args:
        teachers: K times `(N, C)`.
        weights: `(K,)` or `(N, K)`; None means 1/K.
        labels: `(N,)`, needed by "shift".
        adjustments: one name per teacher; empty means none.
    """
    parts, shares = [], []
    for place, teacher in enumerate(teachers):
        logits = decode(teacher).detach()
        if adjustments and adjustments[place] == "shift" and labels is not None:
            logits = shifted(logits, labels)
        share = torch.ones_like(logits[:, 0]) if weights is None else weights.detach()[..., place]
        parts.append(share.reshape(-1, 1) * logits)
        shares.append(share.reshape(-1, 1))
    return torch.stack(parts).sum(0) / torch.stack(shares).sum(0).clamp_min(1e-12)


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    """KA-PS on logits: the label's and the top class's entries swapped (Wen et al. 2019, section 3.1)."""
    label, top = labels.clamp_min(0)[:, None], logits.argmax(1, keepdim=True)
    right = (logits.gather(1, label) >= logits.amax(1, keepdim=True)) | (labels < 0)[:, None]
    swapped = logits.scatter(1, label, logits.gather(1, top)).scatter(1, top, logits.gather(1, label))
    return torch.where(right, logits, swapped)


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
    """`T_0 + slope (mean(omega) - omega_x)` within bounds; the fields are `DynamicTemperatureConfig`'s.

    Args:
        student_logits: `(N, C)`.
        fused: logits `(N, C)` of the fused teacher; `flsw` needs them.
        base: T_0.
    """
    logits = student_logits.detach().float()
    if kind == "cwsm":
        omega = cwsm_omega(logits)
    elif fused is None:
        raise ValueError("flsw compares the student with teachers, but fused is None")
    else:
        omega = flsw_omega(logits, fused.float(), gamma)
    free = base + slope * (omega.mean() - omega)
    values = free.clamp(lowest, highest)
    return SampleTemperatures(values, values != free)
