"""The arguments of the fused loss, checked and spelled out once for every path.

Shapes, dtypes and names are always checked. Values (labels, temperatures, weights) are checked on the CPU;
on a CUDA device that would wait for the device, so there indices are clamped and a row with a bad value
turns to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coursepack.kernels.labels import MixedLabels
from coursepack.kernels.rows import Rows, decode

MAX_TEMPERATURE = 100.0
ADJUSTMENTS = ("none", "shift", "smooth")
DIVERGENCES = ("kl",)
COMBINATIONS = ("mixture", "sum")
STUDENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TEACHER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Teachers = Tensor | Sequence[Tensor | Rows]
"""`(K, N, C)` logits, or a list of K tensors or encoded rows `(N, C)`."""


@dataclass(frozen=True)
class HardLabels:
    """Hard or mixed labels with their valid rows; ids of invalid rows are never used as indices."""

    first: Tensor
    first_valid: Tensor
    lam: Tensor
    """Share of the first label, in the computing dtype; ones for hard labels."""
    second: Tensor | None = None
    second_valid: Tensor | None = None

    def parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`(ids, valid, share)` of each label of a row, all `(N,)`."""
        if self.second is None or self.second_valid is None:
            return [(self.first, self.first_valid, self.lam)]
        return [(self.first, self.first_valid, self.lam), (self.second, self.second_valid, 1 - self.lam)]


@dataclass(frozen=True)
class Arguments:
    """Everything of one call but the tensors that receive gradients."""

    teachers: list[Tensor | Rows]
    labels: HardLabels | None
    temperature: Tensor
    """`(N,)`, of the student."""
    teacher_temperatures: list[Tensor]
    """K times `(N,)`."""
    adjustments: tuple[str, ...]
    smoothing: float
    combine: str
    soft_weight: float
    hard_weight: float
    row_weight: Tensor | None
    bad_rows: Tensor | None
    """`(N,)` bool: rows that turn to NaN (CUDA only)."""
    dtype: torch.dtype
    """float32, or float64 for a float64 student."""

    def teacher_logits(self, index: int) -> Tensor:
        """Decoded logits `(N, C)` of one teacher in the computing dtype, without gradient."""
        teacher = self.teachers[index]
        if isinstance(teacher, Tensor):
            return teacher.detach().to(self.dtype)
        return decode(teacher, self.teacher_temperatures[index]).detach().to(self.dtype)


def teacher_list(teachers: Teachers, shape: tuple[int, ...] | None = None) -> list[Tensor | Rows]:
    """K teachers as a list, each `(N, C)`; all must have `shape`, or the first one's.

    Raises:
        ValueError: no teacher, or shapes that differ.
        TypeError: a tensor of another dtype.
    """
    if isinstance(teachers, Tensor):
        if teachers.ndim != 3:
            raise ValueError(f"teachers has shape {tuple(teachers.shape)}, expected (K, N, C)")
        listed: list[Tensor | Rows] = list(teachers.unbind(0))
    else:
        listed = list(teachers)
    if not listed:
        raise ValueError("teachers is empty, expected at least one")
    shape = tuple(listed[0].shape) if shape is None else shape
    for index, teacher in enumerate(listed):
        if len(teacher.shape) != 2 or tuple(teacher.shape) != shape:
            raise ValueError(f"teachers[{index}] has shape {tuple(teacher.shape)}, expected {shape} (N, C)")
        if isinstance(teacher, Tensor) and teacher.dtype not in TEACHER_DTYPES:
            raise TypeError(f"teachers[{index}] has dtype {teacher.dtype}, expected a floating-point dtype")
    return listed


def check_arguments(
    student_logits: Tensor | None,
    teachers: Teachers,
    labels: Tensor | MixedLabels | None,
    *,
    temperature: float | Tensor,
    teacher_temperature: Tensor | Sequence[float] | None,
    adjustment: str | Sequence[str],
    smoothing: float,
    divergence: str = "kl",
    combine: str = "mixture",
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
) -> Arguments:
    """Check one call and spell its arguments out.

    Raises:
        ValueError: a shape, value or name that is not allowed; the text names it.
        TypeError: a tensor of the wrong dtype.
    """
    if student_logits is not None:
        _check_student(student_logits)
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    listed = teacher_list(teachers, None if student_logits is None else tuple(student_logits.shape))
    rows, classes = listed[0].shape
    device = listed[0].device if student_logits is None else student_logits.device
    for index, teacher in enumerate(listed):
        _check_device(f"teachers[{index}]", teacher, device)
    for name, value, known in (
        ("divergence", divergence, DIVERGENCES),
        ("combine", combine, COMBINATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
    adjustments = _adjustments(adjustment, len(listed))
    adjusts = any(name != "none" for name in adjustments)
    if adjusts and isinstance(labels, MixedLabels):
        raise ValueError("adjustment needs one label per row: it is not defined for MixedLabels")
    if labels is None and (adjusts or hard_weight != 0):
        raise ValueError("labels is None, but adjustment or hard_weight needs labels")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is {smoothing}, expected 0 to 1")
    for name, number in (("soft_weight", soft_weight), ("hard_weight", hard_weight)):
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number}, expected a finite number")

    bad = BadRows(rows, device)
    dtype = dtype or torch.float32
    student_temperature = _temperature("temperature", temperature, rows, device, dtype, bad)
    if teacher_temperature is None:
        teacher_temperatures = [student_temperature] * len(listed)
    else:
        if not isinstance(teacher_temperature, (Tensor, Sequence)):
            raise TypeError(
                f"teacher_temperature is {teacher_temperature!r}, expected one number per teacher "
                f"({len(listed)})"
            )
        if len(teacher_temperature) != len(listed):
            raise ValueError(
                f"teacher_temperature has {len(teacher_temperature)} entries, expected one per teacher "
                f"({len(listed)})"
            )
        teacher_temperatures = [
            _temperature(f"teacher_temperature[{k}]", teacher_temperature[k], rows, device, dtype, bad)
            for k in range(len(listed))
        ]
    return Arguments(
        teachers=listed,
        labels=_hard_labels(labels, rows, classes, device, dtype, ignore_index, bad),
        temperature=student_temperature,
        teacher_temperatures=teacher_temperatures,
        adjustments=adjustments,
        smoothing=smoothing,
        combine=combine,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        row_weight=_row_weight(row_weight, rows, device, dtype, bad),
        bad_rows=bad.mask,
        dtype=dtype,
    )


def check_weights(weights: Tensor | Sequence[float] | None, like: Arguments, rows: int) -> Tensor:
    """Teacher weights as `(N, K)`, keeping their gradient; None means 1/K.

    Raises:
        ValueError: another shape, or (on the CPU) a negative or NaN weight.
    """
    count = len(like.teachers)
    device = like.temperature.device
    if weights is None:
        # float64, so that K times 1/K is one and the divergence of equals is zero at any temperature.
        return torch.full((1, 1), 1 / count, dtype=torch.float64, device=device).expand(rows, count)
    if not isinstance(weights, Tensor):
        if len(weights) != count:
            raise ValueError(f"weights has {len(weights)} entries, expected one per teacher ({count})")
        # Filled one by one: a copy from the host would wait for the device.
        weights = torch.cat([torch.full((1,), w, dtype=like.dtype, device=device) for w in weights])
    if tuple(weights.shape) not in ((count,), (rows, count)):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, expected ({count},) (K,) or ({rows}, {count}) (N, K)"
        )
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights has dtype {weights.dtype}, expected a floating-point dtype")
    _check_device("weights", weights, device)
    wrong = ~(weights.detach() >= 0)
    if device.type != "cpu":
        weights = weights.masked_fill(wrong, float("nan"))
    elif bool(wrong.any()):
        raise ValueError(f"weights holds {weights.detach()[wrong][0].item():g}, expected no negative weight")
    return weights.expand(rows, count)


class BadRows:
    """Refuses bad values on the CPU; elsewhere collects their rows, as looking would wait for the device."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.checks_values = device.type == "cpu"
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


def _check_student(student_logits: Tensor) -> None:
    if student_logits.ndim != 2:
        raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}, expected (N, C)")
    if student_logits.shape[1] == 0:
        raise ValueError("student_logits has no classes")
    if student_logits.dtype not in STUDENT_DTYPES:
        raise TypeError(f"student_logits has dtype {student_logits.dtype}, expected a floating-point dtype")


def _check_device(name: str, value: Tensor | Rows, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device} (where the student's logits are)")


def _check_detached(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient, but the loss gives it none: pass {name}.detach()")


def _adjustments(adjustment: str | Sequence[str], count: int) -> tuple[str, ...]:
    names = (adjustment,) * count if isinstance(adjustment, str) else tuple(adjustment)
    if len(names) != count:
        raise ValueError(f"adjustment has {len(names)} entries, expected one per teacher ({count})")
    for name in names:
        if name not in ADJUSTMENTS:
            raise ValueError(f"adjustment is {name!r}, expected one of {', '.join(map(repr, ADJUSTMENTS))}")
    return names


def _temperature(
    name: str, value: float | Tensor, rows: int, device: torch.device, dtype: torch.dtype, bad: BadRows
) -> Tensor:
    if not isinstance(value, Tensor):
        if not 0 < value <= MAX_TEMPERATURE:
            raise ValueError(f"{name} is {value}, expected 0 < T <= {MAX_TEMPERATURE:g}")
        return torch.full((1,), value, dtype=dtype, device=device).expand(rows)
    _check_detached(name, value)
    if tuple(value.shape) not in ((), (rows,)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a number or ({rows},) (N,)")
    _check_device(name, value, device)
    value = value.to(dtype)
    wrong = ~((value > 0) & (value <= MAX_TEMPERATURE))
    bad.report(name, value, wrong, f"0 < T <= {MAX_TEMPERATURE:g}")
    return value.expand(rows)


def _hard_labels(
    labels: Tensor | MixedLabels | None,
    rows: int,
    classes: int,
    device: torch.device,
    dtype: torch.dtype,
    ignore_index: int,
    bad: BadRows,
) -> HardLabels | None:
    if labels is None:
        return None
    if isinstance(labels, Tensor):
        ids, valid = class_ids("labels", labels, rows, classes, device, ignore_index, bad)
        return HardLabels(ids, valid, torch.ones(rows, dtype=dtype, device=device))
    first, first_valid = class_ids("labels.first", labels.first, rows, classes, device, ignore_index, bad)
    second, second_valid = class_ids("labels.second", labels.second, rows, classes, device, ignore_index, bad)
    lam = labels.lam
    if tuple(lam.shape) != (rows,):
        raise ValueError(f"labels.lam has shape {tuple(lam.shape)}, expected ({rows},) (N,)")
    _check_device("labels.lam", lam, device)
    lam = lam.detach().to(dtype)
    bad.report("labels.lam", lam, ~((lam >= 0) & (lam <= 1)), "0 to 1")
    return HardLabels(first, first_valid, lam, second, second_valid)


def class_ids(
    name: str,
    ids: Tensor,
    rows: int,
    classes: int,
    device: torch.device,
    ignore_index: int,
    bad: BadRows,
) -> tuple[Tensor, Tensor]:
    """Checked class ids `(N,)`, safe to index with, and which of them count."""
    if tuple(ids.shape) != (rows,):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected ({rows},) (N,)")
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {ids.dtype}, expected int64 class ids")
    _check_device(name, ids, device)
    valid = ids != ignore_index
    wrong = valid & ((ids < 0) | (ids >= classes))
    bad.report(name, ids, wrong, f"a class id in 0..{classes - 1} or ignore_index ({ignore_index})")
    return ids.clamp(0, classes - 1), valid


def _row_weight(
    row_weight: Tensor | None, rows: int, device: torch.device, dtype: torch.dtype, bad: BadRows
) -> Tensor | None:
    if row_weight is None:
        return None
    _check_detached("row_weight", row_weight)
    if tuple(row_weight.shape) != (rows,):
        raise ValueError(f"row_weight has shape {tuple(row_weight.shape)}, expected ({rows},) (N,)")
    _check_device("row_weight", row_weight, device)
    bad.report("row_weight", row_weight, row_weight.isnan(), "a number")
    return row_weight.to(dtype)
