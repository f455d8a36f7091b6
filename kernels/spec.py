"""Arguments of the fused loss, with checks of names, numbers, shapes and dtypes.

Every path starts from a `LossCall`. `values.check_values` checks the values inside tensors and expands them
for the paths in torch; the compiled kernel reads the call directly and checks values itself. These checks are
cheap, because they are most of the cost of a call with a small batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coursepack.kernels.labels import MixedLabels
from coursepack.kernels.rows import Rows

MAX_TEMPERATURE = 100.0
ADJUSTMENTS = ("none", "shift", "smooth")
DIVERGENCES = ("kl", "reverse_kl", "js", "mse")
COMBINATIONS = ("mixture", "sum")
REDUCTIONS = ("none", "mean", "sum")
STUDENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TEACHER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Teachers = Tensor | Sequence[Tensor | Rows]
"""`(K, N, C)` logits, or a list of K tensors or encoded rows `(N, C)`."""


class LossSpec(NamedTuple):
    """Options of the fused loss, as documented in `soft_target_loss`.

    A named tuple, because a frozen dataclass takes six times as long to construct.
    """

    weights: Tensor | Sequence[float] | None = None
    temperature: float | Tensor = 1.0
    teacher_temperature: Tensor | Sequence[float] | None = None
    adjustment: str | Sequence[str] = "none"
    smoothing: float = 0.1
    divergence: str = "kl"
    combine: str = "mixture"
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    row_weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "none"


class LossCall(NamedTuple):
    """One checked call of the loss without the student's logits: options, teachers, labels and sizes."""

    spec: LossSpec
    teachers: Tensor | list[Tensor | Rows]
    """`(K, N, C)`, or K tensors or encoded rows `(N, C)`."""
    labels: Tensor | MixedLabels | None
    weights: Tensor | None
    """`(K,)` or `(N, K)`; None means 1/K."""
    teacher_temperatures: list[float | Tensor] | None
    """K times a number, `()` or `(N,)`; None means the student's."""
    adjustments: tuple[str, ...]
    """Adjustment of each teacher."""
    teacher_count: int
    """Number of teachers K."""
    rows: int
    classes: int
    device: torch.device
    dtype: torch.dtype
    """Computing dtype: float32, or float64 for a float64 student."""

    @property
    def teacher_list(self) -> list[Tensor | Rows]:
        """Teachers as a list of K `(N, C)`."""
        return list(self.teachers.unbind(0)) if isinstance(self.teachers, Tensor) else self.teachers

    @property
    def wide_weights(self) -> Tensor | None:
        """Weights `(N, K)`, their values not checked; None means 1/K."""
        return None if self.weights is None else self.weights.expand(self.rows, self.teacher_count)


def check_teachers(teachers: Teachers, shape: tuple[int, ...] | None = None) -> Tensor | list[Tensor | Rows]:
    """Return the teachers after checking that all have `shape`, or else the shape of the first, `(N, C)`.

    Raises:
        ValueError: no teacher, or shapes that differ.
        TypeError: a tensor without a floating-point dtype.
    """
    if isinstance(teachers, Tensor):
        if teachers.ndim != 3:
            raise ValueError(f"teachers has shape {tuple(teachers.shape)}, expected (K, N, C)")
        count, *own = teachers.shape
        if count:
            _check_teacher(0, tuple(own), teachers.dtype, tuple(own) if shape is None else shape)
            return teachers
    given = list(teachers)
    if not given:
        raise ValueError("teachers is empty, expected at least one")
    shape = tuple(given[0].shape) if shape is None else shape
    for index, one in enumerate(given):
        dtype = one.dtype if isinstance(one, Tensor) else None
        _check_teacher(index, tuple(one.shape), dtype, shape)
    return given


def _check_teacher(
    index: int, own: tuple[int, ...], dtype: torch.dtype | None, expected: tuple[int, ...]
) -> None:
    if own != expected or len(own) != 2:
        raise ValueError(f"teachers[{index}] has shape {own}, expected {tuple(expected)} (N, C)")
    if dtype is not None and dtype not in TEACHER_DTYPES:
        raise TypeError(f"teachers[{index}] has dtype {dtype}, expected a floating-point dtype")


def check_call(
    student_logits: Tensor | None,
    teachers: Teachers,
    labels: Tensor | MixedLabels | None,
    spec: LossSpec,
    dtype: torch.dtype | None = None,
) -> LossCall:
    """Check a call as far as possible without reading tensor values.

    Args:
        student_logits: `(N, C)`, or None where no student is compared.
        teachers: as for `soft_target_loss`.
        labels: as for `soft_target_loss`.
        spec: the options.
        dtype: computing dtype without a student; None means float32.

    Raises:
        ValueError: an invalid shape, number or name; the text names it.
        TypeError: a tensor of the wrong dtype.
    """
    if student_logits is not None:
        _check_student(student_logits)
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    given = check_teachers(teachers, None if student_logits is None else student_logits.shape)
    count = given.shape[0] if isinstance(given, Tensor) else len(given)
    one = given[0] if student_logits is None else student_logits
    (rows, classes), device = one.shape, one.device
    dtype = dtype or torch.float32
    for index, teacher in enumerate([given] if isinstance(given, Tensor) else given):
        if teacher.device != device:
            check_device(f"teachers[{index}]", teacher, device)
    adjustments = _check_names(spec, count)
    _check_numbers(spec)
    adjusts = adjustments.count("none") != count
    if adjusts and isinstance(labels, MixedLabels):
        raise ValueError("adjustment needs one label per row: it is not defined for MixedLabels")
    if labels is None and (adjusts or spec.hard_weight != 0):
        raise ValueError("labels is None, but adjustment or hard_weight needs labels")
    _check_temperature("temperature", spec.temperature, rows, device)
    if labels is not None:
        _check_labels(labels, rows, device)
    if spec.row_weight is not None:
        _check_detached("row_weight", spec.row_weight)
        _check_rows("row_weight", spec.row_weight, rows, device)
    weights = None if spec.weights is None else _weights(spec.weights, rows, count, device, dtype)
    own = spec.teacher_temperature
    temperatures = None if own is None else _teacher_temperatures(own, count, rows, device)
    # By place, which takes half the time.
    return LossCall(
        spec, given, labels, weights, temperatures, adjustments, count, rows, classes, device, dtype
    )


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Return the loss `(N,)` as it is, or its mean or sum."""
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _check_names(spec: LossSpec, count: int) -> tuple[str, ...]:
    """Check the names and return the adjustment of each teacher."""
    if spec.divergence not in DIVERGENCES:
        raise _unknown("divergence", spec.divergence, DIVERGENCES)
    if spec.combine not in COMBINATIONS:
        raise _unknown("combine", spec.combine, COMBINATIONS)
    if spec.reduction not in REDUCTIONS:
        raise _unknown("reduction", spec.reduction, REDUCTIONS)
    adjustments = _adjustments(spec.adjustment, count)
    if spec.divergence == "mse" and "smooth" in adjustments:
        raise ValueError('adjustment "smooth" makes probabilities: it is not defined for divergence "mse"')
    return adjustments


def _check_numbers(spec: LossSpec) -> None:
    if not 0 <= spec.smoothing <= 1:
        raise ValueError(f"smoothing is {spec.smoothing}, expected 0 to 1")
    if not math.isfinite(spec.soft_weight):
        raise ValueError(f"soft_weight is {spec.soft_weight}, expected a finite number")
    if not math.isfinite(spec.hard_weight):
        raise ValueError(f"hard_weight is {spec.hard_weight}, expected a finite number")


def _check_student(student_logits: Tensor) -> None:
    if student_logits.ndim != 2:
        raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}, expected (N, C)")
    if student_logits.shape[1] == 0:
        raise ValueError("student_logits has no classes")
    if student_logits.dtype not in STUDENT_DTYPES:
        raise TypeError(f"student_logits has dtype {student_logits.dtype}, expected a floating-point dtype")


def check_device(name: str, value: Tensor | Rows, device: torch.device) -> None:
    """Raise ValueError if a tensor is not on the student's device."""
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device} (where the student's logits are)")


def _unknown(name: str, value: str, known: tuple[str, ...]) -> ValueError:
    return ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")


def _check_detached(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient, but the loss gives it none: pass {name}.detach()")


def _check_rows(name: str, value: Tensor, rows: int, device: torch.device) -> None:
    if tuple(value.shape) != (rows,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({rows},) (N,)")
    check_device(name, value, device)


def _adjustments(adjustment: str | Sequence[str], count: int) -> tuple[str, ...]:
    names = (adjustment,) * count if isinstance(adjustment, str) else tuple(adjustment)
    if len(names) != count:
        raise ValueError(f"adjustment has {len(names)} entries, expected one per teacher ({count})")
    for name in names:
        if name not in ADJUSTMENTS:
            raise _unknown("adjustment", name, ADJUSTMENTS)
    return names


def _check_temperature(name: str, value: float | Tensor, rows: int, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        if not 0 < value <= MAX_TEMPERATURE:
            raise ValueError(f"{name} is {value}, expected 0 < T <= {MAX_TEMPERATURE:g}")
        return
    _check_detached(name, value)
    if tuple(value.shape) not in ((), (rows,)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a number or ({rows},) (N,)")
    check_device(name, value, device)


def _teacher_temperatures(
    value: Tensor | Sequence[float], count: int, rows: int, device: torch.device
) -> list[float | Tensor]:
    if not isinstance(value, (Tensor, Sequence)):
        raise TypeError(f"teacher_temperature is {value!r}, expected one number per teacher ({count})")
    if len(value) != count:
        raise ValueError(f"teacher_temperature has {len(value)} entries, expected one per teacher ({count})")
    each = [value[k] for k in range(count)]
    for k, temperature in enumerate(each):
        _check_temperature(f"teacher_temperature[{k}]", temperature, rows, device)
    return each


def _check_labels(labels: Tensor | MixedLabels, rows: int, device: torch.device) -> None:
    if isinstance(labels, Tensor):
        check_ids("labels", labels, rows, device)
        return
    check_ids("labels.first", labels.first, rows, device)
    check_ids("labels.second", labels.second, rows, device)
    _check_rows("labels.lam", labels.lam, rows, device)


def check_ids(name: str, ids: Tensor, rows: int, device: torch.device) -> None:
    """Raise an error if class ids are not `(N,)` int64."""
    if tuple(ids.shape) != (rows,):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected ({rows},) (N,)")
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {ids.dtype}, expected int64 class ids")
    check_device(name, ids, device)


def _weights(
    weights: Tensor | Sequence[float],
    rows: int,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    if not isinstance(weights, Tensor):
        if len(weights) != count:
            raise ValueError(f"weights has {len(weights)} entries, expected one per teacher ({count})")
        # Filled one by one: a copy from the host would wait for the device.
        return torch.cat([torch.full((1,), w, dtype=dtype, device=device) for w in weights])
    if tuple(weights.shape) not in ((count,), (rows, count)):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, expected ({count},) (K,) or ({rows}, {count}) (N, K)"
        )
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights has dtype {weights.dtype}, expected a floating-point dtype")
    check_device("weights", weights, device)
    return weights
