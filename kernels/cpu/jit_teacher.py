"""One teacher's row from the form it is stored in, compiled. Loaded at first use: importing numba is slow."""

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
from coursepack.kernels.cpu.jit_math import LOG2_E, exp2, fetch, load, load_bits, load_id, store
from coursepack.kernels.cpu.jit_softmax import exponentials
from coursepack.kernels.cpu.layout import FLOAT16, FLOAT32, INT8, NONE, SHIFT, SMOOTH, TOPK

LARGEST = 1.0e30
"""What the inverse of a tiny temperature is held to, so that its products stay finite: the loss is T² D then,
and T² is far below what float32 can tell from zero."""
FETCHED = 4096
"""Bytes of a row that are fetched ahead; it reads on by itself."""
# 1/T from 0 upwards at which the mass of dropped classes is known: `rows.TAIL_TEMPERATURES` and the limit.
KNOTS = (0.0, 0.125, 0.25, 0.5, 1.0)


@njit(forceinline=True)
def inverse_temperature(temperature: float) -> float:
    """1/T, finite."""
    inverse = 1 / temperature
    return inverse if inverse < LARGEST else LARGEST


@njit(forceinline=True)
def factor_of(inverse: float) -> float:
    """What logits are multiplied with to be exponents of two."""
    factor = inverse * LOG2_E
    return float32(factor if factor < LARGEST else LARGEST)


@njit
def read_dense(kind: int, values: int, place: int, classes: int, out: int) -> float:
    """Decode the floating-point row that starts at a place, counted in elements; its largest value."""
    zero, one = float32(0), float32(1)
    if kind == FLOAT32:
        return read_float32(values + 4 * place, classes, one, zero, out)
    if kind == FLOAT16:
        return read_half(values + 2 * place, classes, one, zero, out)
    return read_bfloat16(values + 2 * place, classes, one, zero, out)


@njit
def fetch_row(kind: int, values: int, place: int, classes: int) -> None:
    """Ask for the head of a row while another is worked on.

    Rows are far apart, and the CPU notices that one is read through only after a few lines of it.
    """
    size = 4 if kind == FLOAT32 else 1 if kind == INT8 else 2
    start = values + size * place
    for line in range(0, size * classes if size * classes < FETCHED else FETCHED, 64):
        fetch(start + line)


@njit
def class_id(teacher: Any, n: int, i: int) -> int:
    """The i-th class that a top-k row kept."""
    place = n * teacher.ids_stride + i
    if teacher.ids_bytes == 2:
        return int64(load_bits(teacher.ids, place))
    return int64(load_id(teacher.ids, place))


@njit
def half_at(start: int, place: int) -> float:
    """One float16."""
    return from_half(load_bits(start, place))


@njit
def top_value(teacher: Any, n: int) -> float:
    """The largest logit that a top-k row kept, NaN if one is."""
    top = half_at(teacher.values, n * teacher.stride)
    for i in range(1, teacher.kept):
        value = half_at(teacher.values, n * teacher.stride + i)
        top = value if value > top or value != value else top
    return top


@njit
def dropped_logit(teacher: Any, n: int, dropped: int, top: float, temperature: float) -> float:
    """The logit of every class that a top-k row dropped, as `TopKRows.tail_logit` has it."""
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
    """Whether a top-k row may be written from."""
    highest = 0
    for i in range(teacher.kept):
        place = class_id(teacher, n, i)
        highest = place if place > highest else highest
    return highest < classes


@njit(inline="always")
def read_row(teacher: Any, n: int, classes: int, length: int, temperature: float, out: int) -> float:
    """Decode a row of any kind; its largest value."""
    if teacher.kind == INT8:
        affine = n * teacher.affine_stride
        scale, minimum = half_at(teacher.affine, affine), half_at(teacher.affine, affine + 1)
        return read_int8(teacher.values + n * teacher.stride, classes, scale, minimum, out)
    if teacher.kind == TOPK:
        top = top_value(teacher, n)
        rest = dropped_logit(teacher, n, classes - teacher.kept, top, temperature)
        fill(out, 0, classes, float32(rest))
        fill(out, classes, length, float32(-np.inf))
        for i in range(teacher.kept):
            store(out, class_id(teacher, n, i), half_at(teacher.values, n * teacher.stride + i))
        return top
    return read_dense(teacher.kind, teacher.values, n * teacher.stride, classes, out)


@njit(inline="always")
def few_exponentials(
    teacher: Any, n: int, classes: int, length: int, temperature: float, factor: float, spare: int, out: int
) -> float:
    """`exponentials` of a top-k row, of which only those of the classes it kept are worked out."""
    kept = teacher.kept
    dropped = classes - kept
    row = teacher.values + 2 * n * teacher.stride
    top = read_half(row, kept, float32(1), float32(0), spare)
    total = exponentials(spare, top, factor, out, lots(kept + LOT - 1))
    write_float32(out, spare, kept)
    rest = exp2(float32((dropped_logit(teacher, n, dropped, top, temperature) - top) * factor))
    fill(out, 0, classes, rest)
    fill(out, classes, length, float32(0))
    for i in range(kept):
        store(out, class_id(teacher, n, i), load(spare, i))
    return total + dropped * float64(rest)


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
    """Probabilities of a teacher's row, softened and adjusted, up to a factor; their sum.

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
    factor = factor_of(inverse_temperature(temperature))
    adjusts = teacher.adjustment != NONE and label >= 0
    if teacher.kind == TOPK and not adjusts:
        return few_exponentials(teacher, n, classes, length, temperature, factor, logits, out)
    top = read_row(teacher, n, classes, length, temperature, logits)
    wrong = adjusts and load(logits, label) < top
    if wrong and teacher.adjustment == SHIFT:
        # Swapping two logits swaps their probabilities. Ties of the top go to the lowest class.
        first = 0
        while first < classes - 1 and load(logits, first) != top:
            first += 1
        at_label = load(logits, label)
        store(logits, label, load(logits, first))
        store(logits, first, at_label)
    total = exponentials(logits, top, factor, out, length)
    if wrong and teacher.adjustment == SMOOTH:
        fill(out, 0, classes, float32(smoothing / classes))
        fill(out, classes, length, float32(0))
        store(out, label, load(out, label) + float32(1 - smoothing))
        # A row with a NaN stays NaN: the sum of its exponentials tells.
        total = 1.0 if total == total else total
    return total
