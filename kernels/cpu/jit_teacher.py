"""Decoding and softmax of one teacher row, compiled. Imported at first use: numba is slow to import."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from coursepack.kernels.cpu.jit_base import float32, float64, int64, njit
from coursepack.kernels.cpu.jit_convert import (
    LOT,
    fill,
    from_half,
    lots,
    read_bfloat16,
    read_float32,
    read_half,
    read_int8,
    write_float32,
)
from coursepack.kernels.cpu.jit_int4 import read_int4
from coursepack.kernels.cpu.jit_math import (
    LOG2_E,
    exp2,
    load,
    load_uint16,
    load_uint32,
    prefetch_lines,
    store,
)
from coursepack.kernels.cpu.jit_packed import packed_exponentials, read_packed
from coursepack.kernels.cpu.jit_softmax import exponentials, scale
from coursepack.kernels.cpu.layout import FLOAT16, FLOAT32, INT4, INT8, NONE, PACKED, SHIFT, SMOOTH, TOPK

LARGEST = 1.0e30
"""Upper bound of 1/T, which keeps products finite. The loss T² D is zero in float32 at such temperatures."""
FETCHED = 4096
"""Bytes of a row to prefetch at once; the CPU prefetches the rest on its own."""
# Values of 1/T at which the mass of dropped classes is known: 0 and the inverse `rows.TAIL_TEMPERATURES`.
KNOTS = (0.0, 0.125, 0.25, 0.5, 1.0)


@njit(forceinline=True)
def inverse_temperature(temperature: float) -> float:
    """Return 1/T, at most `LARGEST`."""
    inverse = 1 / temperature
    return inverse if inverse < LARGEST else LARGEST


@njit(forceinline=True)
def factor_of(inverse: float) -> float:
    """Return the factor that turns logits into exponents of two."""
    factor = inverse * LOG2_E
    return float32(factor if factor < LARGEST else LARGEST)


@njit
def read_dense(kind: int, values: int, index: int, classes: int, out: int) -> float:
    """Decode the floating-point row that starts at an element index and return its largest value."""
    zero, one = float32(0), float32(1)
    if kind == FLOAT32:
        return read_float32(values + 4 * index, classes, one, zero, out)
    if kind == FLOAT16:
        return read_half(values + 2 * index, classes, one, zero, out)
    return read_bfloat16(values + 2 * index, classes, one, zero, out)


@njit
def row_place(kind: int, values: int, index: int, count: int) -> tuple[int, int]:
    """Return the address and the bytes of a row of `count` elements that starts at an element index."""
    width = 4 if kind == FLOAT32 else 1 if kind in (INT4, INT8, PACKED) else 2
    return values + width * index, width * count


@njit
def teacher_row(teacher: Any, n: int, classes: int) -> tuple[int, int]:
    """Return the address and the bytes of a teacher's row."""
    count = classes
    if teacher.kind == INT4:
        count = (classes + 1) >> 1
    elif teacher.kind in (TOPK, PACKED):
        count = teacher.stride
    return row_place(teacher.kind, teacher.values, n * teacher.stride, count)


@njit
def prefetch_start(start: int, size: int) -> None:
    """Prefetch the start of a row, where nothing prefetches the row bit by bit.

    Rows are far apart, and the CPU detects a sequential read only after a few cache lines.
    """
    prefetch_lines(start, size if size < FETCHED else FETCHED)


@njit
def class_id(teacher: Any, n: int, i: int) -> int:
    """Return the i-th kept class of a top-k row."""
    index = n * teacher.ids_stride + i
    if teacher.ids_bytes == 2:
        return int64(load_uint16(teacher.ids, index))
    return int64(load_uint32(teacher.ids, index))


@njit
def half_at(start: int, index: int) -> float:
    """Read one float16 as float32."""
    return from_half(load_uint16(start, index))


@njit
def top_value(teacher: Any, n: int) -> float:
    """Return the largest kept logit of a top-k row, NaN if any is NaN."""
    top = half_at(teacher.values, n * teacher.stride)
    for i in range(1, teacher.kept):
        value = half_at(teacher.values, n * teacher.stride + i)
        top = value if value > top or value != value else top
    return top


@njit
def dropped_logit(teacher: Any, n: int, dropped: int, top: float, temperature: float) -> float:
    """Return the common logit of the dropped classes of a top-k row, as `TopKRows.tail_logit`."""
    if dropped == 0:
        return top
    inverse, limit = float32(1 / temperature), float32(math.log(dropped))
    segment = 0
    while segment < len(KNOTS) - 2 and float32(KNOTS[segment + 1]) < inverse:
        segment += 1
    tail = n * teacher.tail_stride
    low = limit if segment == 0 else half_at(teacher.tail, tail + len(KNOTS) - 1 - segment)
    high = half_at(teacher.tail, tail + len(KNOTS) - 2 - segment)
    start, stop = float32(KNOTS[segment]), float32(KNOTS[segment + 1])
    excess = (low + (high - low) * ((inverse - start) / (stop - start)) - limit) / inverse
    return top + (float32(0) if excess > 0 else excess)


@njit
def ids_are_classes(teacher: Any, n: int, classes: int) -> bool:
    """True if all class ids of a top-k row are below `classes`."""
    highest = 0
    for i in range(teacher.kept):
        index = class_id(teacher, n, i)
        highest = index if index > highest else highest
    return highest < classes


@njit(inline="always")
def read_row(
    teacher: Any, n: int, classes: int, length: int, temperature: float, spare: int, out: int
) -> float:
    """Decode a row of any kind and return its largest value. `spare` is a row of scratch."""
    if teacher.kind == INT8:
        affine = n * teacher.affine_stride
        scale, minimum = half_at(teacher.affine, affine), half_at(teacher.affine, affine + 1)
        return read_int8(teacher.values + n * teacher.stride, classes, scale, minimum, out)
    if teacher.kind == INT4:
        own = n * teacher.affine_stride
        top, span = half_at(teacher.affine, own), half_at(teacher.affine, own + 1)
        return read_int4(teacher.values + n * teacher.stride, classes, length, top, span, out)
    if teacher.kind == TOPK:
        top = top_value(teacher, n)
        rest = dropped_logit(teacher, n, classes - teacher.kept, top, temperature)
        fill(out, 0, classes, float32(rest))
        fill(out, classes, length, float32(-np.inf))
        for i in range(teacher.kept):
            store(out, class_id(teacher, n, i), half_at(teacher.values, n * teacher.stride + i))
        return top
    if teacher.kind == PACKED:
        return read_packed(teacher, n, classes, length, temperature, spare, out)
    return read_dense(teacher.kind, teacher.values, n * teacher.stride, classes, out)


@njit(inline="always")
def topk_exponentials(
    teacher: Any, n: int, classes: int, length: int, temperature: float, factor: float, spare: int, out: int
) -> float:
    """Compute `exponentials` of a top-k row, evaluating only those of the kept classes."""
    kept = teacher.kept
    dropped = classes - kept
    row = teacher.values + 2 * n * teacher.stride
    top = read_half(row, kept, float32(1), float32(0), spare)
    total = exponentials(spare, top, factor, out, lots(kept + LOT - 1), out, 0)
    write_float32(out, spare, kept)
    rest = exp2(float32((dropped_logit(teacher, n, dropped, top, temperature) - top) * factor))
    fill(out, 0, classes, rest)
    fill(out, classes, length, float32(0))
    for i in range(kept):
        store(out, class_id(teacher, n, i), load(spare, i))
    return total + dropped * float64(rest)


@njit
def swap_with_top(logits: int, label: int, top: float, classes: int) -> None:
    """Swap the logits of a label and of the top class, which swaps their probabilities.

    Ties for the top go to the lowest class.
    """
    first = 0
    while first < classes - 1 and load(logits, first) != top:
        first += 1
    at_label = load(logits, label)
    store(logits, label, load(logits, first))
    store(logits, first, at_label)


@njit
def teacher_logits(
    teacher: Any, n: int, label: int, classes: int, length: int, temperature: float, spare: int, out: int
) -> None:
    """Write the adjusted logits of a teacher row over its temperature, padded with 0.

    Args:
        teacher: its record, without the adjustment SMOOTH, which makes probabilities.
        n: the row.
        label: its class id, or -1 where it has none that counts.
        classes: C.
        length: C in whole lots.
        temperature: T of this teacher and row.
        spare: a row of scratch.
        out: a row for the result.
    """
    ahead, size = teacher_row(teacher, n + 1, classes)
    prefetch_start(ahead, size)
    top = read_row(teacher, n, classes, length, temperature, spare, out)
    if teacher.adjustment == SHIFT and label >= 0 and load(out, label) < top:
        swap_with_top(out, label, top, classes)
    fill(out, classes, length, float32(0))
    scale(out, float32(inverse_temperature(temperature)), length)


@njit
def is_expanded(teacher: Any, label: int) -> bool:
    """True if a row is softened as it is stored and then expanded: top-k rows that need no adjustment."""
    return teacher.kind in (TOPK, PACKED) and (teacher.adjustment == NONE or label < 0)


@njit
def decode(
    teacher: Any, n: int, label: int, classes: int, length: int, temperature: float, spare: int, out: int
) -> float:
    """Decode a teacher row for `soften` and return its largest value, 0 for a row that needs no decoding.

    Arguments are those of `teacher_exponentials`; `spare` and `out` are rows of scratch.
    """
    if is_expanded(teacher, label):
        return float32(0)
    return read_row(teacher, n, classes, length, temperature, spare, out)


@njit
def soften(
    teacher: Any,
    n: int,
    label: int,
    classes: int,
    length: int,
    temperature: float,
    smoothing: float,
    top: float,
    logits: int,
    out: int,
) -> float:
    """Do what `teacher_exponentials` does with a row that `decode` has written to `logits`.

    The next row is prefetched meanwhile.
    """
    factor = factor_of(inverse_temperature(temperature))
    ahead, size = teacher_row(teacher, n + 1, classes)
    if is_expanded(teacher, label):
        prefetch_start(ahead, size)
        if teacher.kind == TOPK:
            return topk_exponentials(teacher, n, classes, length, temperature, factor, logits, out)
        return packed_exponentials(teacher, n, classes, length, temperature, factor, logits, out)
    wrong = teacher.adjustment != NONE and label >= 0 and load(logits, label) < top
    if wrong and teacher.adjustment == SHIFT:
        swap_with_top(logits, label, top, classes)
    total = exponentials(logits, top, factor, out, length, ahead, size)
    if wrong and teacher.adjustment == SMOOTH:
        fill(out, 0, classes, float32(smoothing / classes))
        fill(out, classes, length, float32(0))
        store(out, label, load(out, label) + float32(1 - smoothing))
        # A row with a NaN stays NaN: its sum of exponentials is NaN.
        total = 1.0 if total == total else total
    return total


@njit
def teacher_exponentials(
    teacher: Any,
    n: int,
    label: int,
    classes: int,
    length: int,
    temperature: float,
    smoothing: float,
    logits: int,
    out: int,
) -> float:
    """Write the softened and adjusted probabilities of a teacher row, up to a factor, and return their sum.

    Args:
        teacher: its record.
        n: the row.
        label: its class id, or -1 where it has none that counts.
        classes: C.
        length: C in whole lots.
        temperature: T of this teacher and row.
        smoothing: epsilon of label smoothing.
        logits: a row of scratch to decode to.
        out: a row of scratch for the probabilities.
    """
    top = decode(teacher, n, label, classes, length, temperature, out, logits)
    return soften(teacher, n, label, classes, length, temperature, smoothing, top, logits, out)
