"""Values of a call of the fused loss, checked and expanded to rows for the paths in torch.

Values (labels, temperatures, weights) are checked on the CPU. On a CUDA device that would wait for the
device, and under `torch.compile` break the graph, so there indices are clamped and a row with a bad value
turns to NaN.
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
    """Hard or mixed labels with their valid rows; ids of invalid rows are never used as indices."""

    first: Tensor
    first_valid: Tensor
    dtype: torch.dtype
    """The computing dtype."""
    lam: Tensor | None = None
    """Share of the first label, in the computing dtype; None means all of it."""
    second: Tensor | None = None
    second_valid: Tensor | None = None

    def parts(self) -> list[LabelPart]:
        """`(ids, valid, share)` of each label of a row, all `(N,)`; share None means 1."""
        if self.second is None or self.second_valid is None or self.lam is None:
            return [(self.first, self.first_valid, None)]
        return [(self.first, self.first_valid, self.lam), (self.second, self.second_valid, 1 - self.lam)]

    def counted(self, part: LabelPart) -> Tensor:
        """Share `(N,)` of a label that counts, 0 of one that does not."""
        _, valid, share = part
        return valid.to(self.dtype) if share is None else torch.where(valid, share, 0)


@dataclass(frozen=True)
class LossValues:
    """One call of the loss with its values checked and expanded to rows, without what receives gradients."""

    spec: LossSpec
    teachers: list[Tensor | Rows]
    adjustments: tuple[str, ...]
    """One per teacher."""
    labels: HardLabels | None
    temperature: Tensor
    """`(N,)`, of the student."""
    teacher_temperatures: list[Tensor]
    """K times `(N,)`."""
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
        ValueError: a label, temperature or weight that is not allowed (on the CPU); the text names it.
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
        teachers=call.teachers,
        adjustments=call.adjustments,
        labels=_hard_labels(call.labels, call, bad),
        temperature=temperature,
        teacher_temperatures=teacher_temperatures,
        row_weight=_row_weight(call.spec.row_weight, call, bad),
        bad_rows=bad.mask,
        dtype=call.dtype,
    )


def full_weights(call: LossCall) -> Tensor:
    """Teacher weights as `(N, K)`, keeping their gradient; 1/K where none were given.

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
    """Refuses bad values on the CPU; on a device and in a graph, which cannot look, collects their rows."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.checks_values = is_eager_cpu(device)
        self.mask: Tensor | None = None

    def report(self, name: str, values: Tensor, bad: Tensor, expected: str) -> None:
        """Name the first bad value, or remember the rows."""
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
    """Checked class ids `(N,)`, safe to index with, and a mask of those that count."""
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
