"""Values of a call of the fused loss, checked and expanded to rows for the paths in torch.

Labels, temperatures and weights are checked on the CPU. On CUDA a check would wait for the device, and under
`torch.compile` it would break the graph; there, indices are clamped and a row with an invalid value becomes
NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coursepack.kernels.rows import decode, is_eager_cpu
from coursepack.kernels.spec import MAX_TEMPERATURE

if TYPE_CHECKING:
    from coursepack.kernels.labels import MixedLabels
    from coursepack.kernels.rows import Rows
    from coursepack.kernels.spec import LossCall, LossSpec


LabelPart = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class HardLabels:
    """Hard or mixed labels with a mask of valid rows; all ids are safe to index with."""

    first: Tensor
    first_valid: Tensor
    dtype: torch.dtype
    """The computing dtype."""
    lam: Tensor | None = None
    """Share of the first label, in the computing dtype; None means all of it."""
    second: Tensor | None = None
    second_valid: Tensor | None = None

    def parts(self) -> list[LabelPart]:
        """Return `(ids, valid, share)` of each label of a row, all `(N,)`; share None means 1."""
        if self.second is None or self.second_valid is None or self.lam is None:
            return [(self.first, self.first_valid, None)]
        return [(self.first, self.first_valid, self.lam), (self.second, self.second_valid, 1 - self.lam)]

    def counted(self, part: LabelPart) -> Tensor:
        """Return the share `(N,)` of a label, 0 where it is not valid."""
        _, valid, share = part
        return valid.to(self.dtype) if share is None else torch.where(valid, share, 0)


@dataclass(frozen=True)
class LossValues:
    """Checked values of one call, expanded to rows, except student logits and weights."""

    spec: LossSpec
    teachers: list[Tensor | Rows]
    adjustments: tuple[str, ...]
    """Adjustment of each teacher."""
    labels: HardLabels | None
    temperature: Tensor
    """Student's temperature `(N,)`."""
    teacher_temperatures: list[Tensor]
    """Temperature of each teacher, K times `(N,)`."""
    row_weight: Tensor | None
    """`(N,)` in the computing dtype."""
    bad_rows: Tensor | None
    """`(N,)` bool: rows that turn to NaN (CUDA and `torch.compile` only)."""
    dtype: torch.dtype
    """Computing dtype: float32, or float64 for a float64 student."""

    def teacher_logits(self, index: int) -> Tensor:
        """Decoded logits `(N, C)` of one teacher in the computing dtype, without gradient."""
        teacher = self.teachers[index]
        if isinstance(teacher, Tensor):
            return teacher.detach().to(self.dtype)
        return decode(teacher, self.teacher_temperatures[index]).detach().to(self.dtype)


def check_values(call: LossCall) -> LossValues:
    """Check the values of a call and expand them.

    Raises:
        ValueError: an invalid label, temperature or weight (on the CPU); the text names it.
    """
    bad = BadRows(call.rows, call.device)
    temperature = _temperature("temperature", call.spec.temperature, call, bad)
    if call.teacher_temperatures is None:
        teacher_temperatures = [temperature] * call.teacher_count
    else:
        teacher_temperatures = [
            _temperature(f"teacher_temperature[{k}]", each, call, bad)
            for k, each in enumerate(call.teacher_temperatures)
        ]
    return LossValues(
        spec=call.spec,
        teachers=call.teacher_list,
        adjustments=call.adjustments,
        labels=_hard_labels(call.labels, call, bad),
        temperature=temperature,
        teacher_temperatures=teacher_temperatures,
        row_weight=_row_weight(call.spec.row_weight, call, bad),
        bad_rows=bad.mask,
        dtype=call.dtype,
    )


def full_weights(call: LossCall) -> Tensor:
    """Return the teacher weights `(N, K)`, differentiable; 1/K if none were given.

    Raises:
        ValueError: a negative or NaN weight (on the CPU).
    """
    weights, count, device = call.weights, call.teacher_count, call.device
    if weights is None:
        # float64, so that K times 1/K is one and the divergence of equals is zero at any temperature.
        weights = torch.full((1, 1), 1 / count, dtype=torch.float64, device=device)
        return weights.expand(call.rows, count)
    wrong = ~(weights.detach() >= 0)
    if not is_eager_cpu(device):
        weights = weights.masked_fill(wrong, float("nan"))
    elif bool(wrong.any()):
        raise ValueError(f"weights holds {weights.detach()[wrong][0].item():g}, expected no negative weight")
    return weights.expand(call.rows, count)


class BadRows:
    """Handles invalid values: raises on the CPU, collects a mask of their rows on CUDA and under compile."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.checks_values = is_eager_cpu(device)
        self.mask: Tensor | None = None

    def report(self, name: str, values: Tensor, bad: Tensor, expected: str) -> None:
        """Raise ValueError for the first bad value, or add its row to the mask."""
        if self.checks_values:
            if bool(bad.any()):
                row = int(bad.expand(self.rows).to(torch.uint8).argmax())
                value = values.expand(self.rows)[row].item()
                raise ValueError(f"{name} holds {value:g} in row {row}, expected {expected}")
        else:
            self.mask = bad.expand(self.rows) if self.mask is None else self.mask | bad


def _temperature(name: str, value: float | Tensor, call: LossCall, bad: BadRows) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((1,), value, dtype=call.dtype, device=call.device).expand(call.rows)
    value = value.to(call.dtype)
    wrong = ~((value > 0) & (value <= MAX_TEMPERATURE))
    bad.report(name, value, wrong, f"0 < T <= {MAX_TEMPERATURE:g}")
    return value.expand(call.rows)


def _hard_labels(labels: Tensor | MixedLabels | None, call: LossCall, bad: BadRows) -> HardLabels | None:
    if labels is None:
        return None
    if isinstance(labels, Tensor):
        return HardLabels(*class_ids("labels", labels, call, bad), call.dtype)
    first, first_valid = class_ids("labels.first", labels.first, call, bad)
    second, second_valid = class_ids("labels.second", labels.second, call, bad)
    lam = labels.lam.detach().to(call.dtype)
    bad.report("labels.lam", lam, ~((lam >= 0) & (lam <= 1)), "0 to 1")
    return HardLabels(first, first_valid, call.dtype, lam, second, second_valid)


def class_ids(name: str, ids: Tensor, call: LossCall, bad: BadRows) -> tuple[Tensor, Tensor]:
    """Return checked class ids `(N,)`, clamped to valid indices, and a mask of those not ignored."""
    classes, ignore_index = call.classes, call.spec.ignore_index
    valid = ids != ignore_index
    wrong = valid & ((ids < 0) | (ids >= classes))
    bad.report(name, ids, wrong, f"a class id in 0..{classes - 1} or ignore_index ({ignore_index})")
    return ids.clamp(0, classes - 1), valid


def _row_weight(row_weight: Tensor | None, call: LossCall, bad: BadRows) -> Tensor | None:
    if row_weight is None:
        return None
    bad.report("row_weight", row_weight, row_weight.isnan(), "a number")
    return row_weight.to(call.dtype)
