"""Packs a checked call into the records that the compiled kernels read: addresses, strides, numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coursepack.kernels.cpu import layout
from coursepack.kernels.int4 import Int4Rows
from coursepack.kernels.labels import MixedLabels
from coursepack.kernels.packed import PackedTopKRows
from coursepack.kernels.rows import DenseRows, Int8Rows, TopKRows
from coursepack.kernels.spec import ADJUSTMENTS, COMBINATIONS, DIVERGENCES

if TYPE_CHECKING:
    from coursepack.kernels.rows import Rows
    from coursepack.kernels.spec import LossCall

_ADJUSTMENT_CODES = {name: code for code, name in enumerate(ADJUSTMENTS)}
Results = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Tensors for what a kernel computes: the fields `loss`, `total`, `grad` and `grad_weights` of `layout`."""
Fields = tuple[int, ...]
"""First fields of a TEACHER record; those that follow are 0."""
_EMPTY: Fields = (0,) * layout.FIELDS
KINDS = {torch.float32: layout.FLOAT32, torch.float16: layout.FLOAT16, torch.bfloat16: layout.BFLOAT16}


def pack(
    call: LossCall,
    weights: Tensor | None,
    student: Tensor | None,
    results: Results,
    *,
    scratch: Tensor | None,
    scratch_stride: int,
    shares: int = 1,
    state: int = 0,
    grad_scale: float = 1.0,
) -> tuple[bytes, list[object]]:
    """Pack a CALL record followed by TEACHER records.

    Args:
        call: the checked call.
        weights: `(N, K)` float64 or float32 of any stride, or None for 1/K.
        student: `(N, C)` with contiguous rows.
        results: tensors to write to; None for what is not wanted.
        scratch: float32 scratch memory.
        scratch_stride: number of scratch values per thread.
        shares: a thread takes the rows that are left over this number.
        state: address of four int64 (`layout`).
        grad_scale: factor of the total and of the gradient with respect to the student.

    Returns:
        The bytes, and objects that must stay alive while the bytes are in use.
    """
    spec = call.spec
    first, second, lam = _labels(call.labels)
    temperature, row_weight = _temperature(spec.temperature), column(spec.row_weight)
    start, step, fixed = _temperature_fields(temperature)
    parts, each = _stack(call.teachers) if isinstance(call.teachers, Tensor) else _list(call.teachers)
    if call.adjustments.count("none") != call.teacher_count:
        each[layout.ADJUSTMENT :: layout.FIELDS] = map(_ADJUSTMENT_CODES.__getitem__, call.adjustments)
    own = None
    if call.teacher_temperatures is not None:
        own = [_temperature(value) for value in call.teacher_temperatures]
        starts, steps, numbers = zip(*map(_temperature_fields, own), strict=True)
        each[layout.TEMPERATURE :: layout.FIELDS] = starts
        each[layout.TEMPERATURE_STRIDE :: layout.FIELDS] = steps
        each[layout.FIXED_TEMPERATURE :: layout.FIELDS] = numbers
    data = layout.packer(call.teacher_count)(
        call.rows,
        call.classes,
        call.teacher_count,
        shares,
        state,
        address(scratch),
        scratch_stride,
        address(student),
        0 if student is None else student.stride(0),
        0 if student is None else KINDS[student.dtype],
        *map(address, results),
        address(first),
        address(second),
        address(lam),
        spec.ignore_index,
        address(row_weight),
        start,
        step,
        address(weights),
        *((0, 0, 0) if weights is None else (*weights.stride(), weights.element_size())),
        DIVERGENCES.index(spec.divergence),
        COMBINATIONS.index(spec.combine),
        fixed,
        spec.soft_weight,
        spec.hard_weight,
        spec.smoothing,
        grad_scale,
        *each,
    )
    return data, [student, weights, first, second, lam, temperature, own, row_weight, parts]


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def row_major(values: Tensor) -> Tensor:
    """Return the values with contiguous rows and no lazy negation."""
    values = _stored(values)
    return values if values.stride(1) == 1 or values.shape[1] == 1 else values.detach().contiguous()


def plain(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the values in another dtype, without lazy negation."""
    return None if values is None else values.detach().resolve_neg().to(dtype)


def column(values: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Return the values `(N,)` contiguous and in another dtype."""
    if values is None or (values.dtype == dtype and values.is_contiguous() and not values.is_neg()):
        return values
    return values.detach().resolve_neg().to(dtype).contiguous()


def _stored(values: Tensor) -> Tensor:
    """Return values whose memory holds what they are: no lazy negation."""
    return values.detach().resolve_neg() if values.is_neg() else values


def _labels(labels: Tensor | MixedLabels | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if isinstance(labels, MixedLabels):
        first, second = (column(ids, torch.int64) for ids in (labels.first, labels.second))
        return first, second, column(labels.lam)
    return column(labels, torch.int64), None, None


def _temperature(value: float | Tensor) -> float | Tensor:
    return value.detach().resolve_neg().to(torch.float32) if isinstance(value, Tensor) else value


def _temperature_fields(temperature: float | Tensor) -> tuple[int, int, float]:
    """Return the address, stride and fixed value of a temperature."""
    if isinstance(temperature, Tensor):
        return temperature.data_ptr(), temperature.stride(0) if temperature.ndim else 0, 0.0
    return 0, 0, temperature


def _stack(teachers: Tensor) -> tuple[Tensor, list[float]]:
    """Return the tensor to keep alive and the fields of the teachers `(K, N, C)`, but not of temperatures
    and adjustments.
    """
    values = _stored(teachers)
    step, row, column = values.stride()
    if column != 1 and values.shape[2] != 1:
        values = values.detach().contiguous()
        step, row, _ = values.stride()
    count, start, step = values.shape[0], values.data_ptr(), step * values.element_size()
    fields: list[float] = [KINDS[values.dtype], 0, row, *_EMPTY[3:]] * count
    fields[layout.VALUES :: layout.FIELDS] = [start + k * step for k in range(count)]
    return values, fields


def _list(teachers: list[Tensor | Rows]) -> tuple[list[list[Tensor]], list[float]]:
    """Do what `_stack` does for a list of teachers."""
    held: list[list[Tensor]] = []
    fields: list[float] = []
    for teacher in teachers:
        parts, own = _teacher(teacher)
        held.append(parts)
        fields += own
        fields += _EMPTY[len(own) :]
    return held, fields


def _teacher(teacher: Tensor | Rows) -> tuple[list[Tensor], Fields]:
    """Return the tensors of a teacher and its fields."""
    if isinstance(teacher, Int8Rows):
        q, affine = row_major(teacher.q), teacher.affine.contiguous()
        fields = (layout.INT8, q.data_ptr(), q.stride(0), affine.data_ptr(), 2)
        return [q, affine], fields
    if isinstance(teacher, Int4Rows):
        q, scale = row_major(teacher.q), teacher.scale.contiguous()
        return [q, scale], (layout.INT4, q.data_ptr(), q.stride(0), scale.data_ptr(), 2)
    if isinstance(teacher, TopKRows):
        ids, values = teacher.ids.contiguous(), teacher.values.contiguous()
        tail, kept = teacher.tail.contiguous(), teacher.ids.shape[1]
        return [ids, values, tail], (
            layout.TOPK,
            values.data_ptr(),
            kept,
            0,
            0,
            ids.data_ptr(),
            kept,
            ids.element_size(),
            kept,
            tail.data_ptr(),
            tail.shape[1],
        )
    if isinstance(teacher, PackedTopKRows):
        entries, scale = teacher.entries.contiguous(), teacher.scale.contiguous()
        places = (entries.data_ptr(), entries.shape[1], scale.data_ptr(), scale.shape[1])
        return [entries, scale], (layout.PACKED, *places, 0, 0, 0, teacher.kept, 0, 0, teacher.low_bits)
    dense = teacher.values if isinstance(teacher, DenseRows) else teacher
    assert isinstance(dense, Tensor)
    dense = row_major(dense)
    return [dense], (KINDS[dense.dtype], dense.data_ptr(), dense.stride(0))
