"""The fused loss for the rows of a batch, compiled. Imported at first use: numba is slow to import.

Rows are processed one at a time: the student's softmax, then for each teacher decoding, softening and
adjusting, then the mixture, the divergence and both gradients. A thread holds only a few float32 rows,
whatever N and K. The formulas are those of `coursepack.kernels.analytic`.

Rows are independent and summed in a fixed order, so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

from coursepack.kernels.cpu.jit_base import SOURCES, compiled, float32, float64, njit, types
from coursepack.kernels.cpu.jit_call import each_row, float_at, label_at, temperature_at, weight_at
from coursepack.kernels.cpu.jit_convert import LOT, fill, lots, write_bfloat16, write_float32, write_half
from coursepack.kernels.cpu.jit_math import LOG2_E, load, store
from coursepack.kernels.cpu.jit_softmax import add_scaled, divergence, dot, exponentials, scale, weight_slopes
from coursepack.kernels.cpu.jit_teacher import (
    factor_of,
    inverse_temperature,
    prefetch_row,
    read_dense,
    teacher_exponentials,
)
from coursepack.kernels.cpu.layout import FLOAT16, FLOAT32


@njit
def x_log_x(x: float) -> float:
    """Return x log x, 0 at 0."""
    return x * math.log(x) if x > 0 else 0.0


@njit
def soft_part(
    call: Any, teachers: Any, n: int, factor: float, top: float, logits: int, out: int, scratch: int
) -> float:
    """Return `factor` times T² D of one row and write the gradient with respect to the student to `out`.

    `logits` are the student's, `top` is the largest of them, and `scratch` is the start of the working rows.
    """
    length = lots(call.classes + LOT - 1)
    row = 4 * length
    student, spare, mixture, kept = scratch, scratch + row, scratch + 2 * row, scratch + 3 * row
    temperature = temperature_at(call, n)
    inverse = inverse_temperature(temperature)
    total = exponentials(logits, top, factor_of(inverse), student, length)
    inverse32, log_total, scale_q = float32(inverse), float32(math.log(total)), float32(1 / total)
    label = label_at(call.labels, n, call.ignore_index) if not call.second else -1
    squared = factor * temperature * temperature
    slope = float32(factor * temperature)
    one, zero = float32(1), float32(0)
    mixes = call.combine == 0
    keeps = call.grad_weights and mixes
    grad_weights = call.grad_weights + 4 * n * call.teachers
    weight_sum = 0.0
    for k in range(call.teachers):
        weight_sum += weight_at(call, n, k)
    result = 0.0
    fill(mixture if mixes else out, 0, length, zero)
    for k in range(call.teachers):
        probs = kept + k * row if keeps else kept
        own, weight = temperature_at(teachers[k], n), weight_at(call, n, k)
        ahead = teachers[k + 1 if k + 1 < call.teachers else 0]
        prefetch_row(ahead.kind, ahead.values, (n + (k + 1) // call.teachers) * ahead.stride, call.classes)
        size = teacher_exponentials(
            teachers[k], n, label, call.classes, length, own, call.smoothing, spare, probs
        )
        if mixes:
            # The mixture is normalized to a sum of one.
            share = weight / weight_sum if weight_sum > 0 else 0.0
            add_scaled(probs, float32(share / size), mixture, length)
            if keeps:
                store(grad_weights, k, float32(1 / size))
            continue
        each = divergence(
            probs,
            student,
            logits,
            top,
            inverse32,
            log_total,
            float32(1 / size),
            scale_q,
            slope,
            spare,
            length,
        )
        add_scaled(spare, float32(weight), out, length)
        if weight != 0:
            result += weight * each
        if call.grad_weights:
            store(grad_weights, k, float32(squared * each))
    if not mixes:
        return squared * result
    sum32 = float32(weight_sum)
    each = divergence(
        mixture, student, logits, top, inverse32, log_total, one, scale_q, slope * sum32, out, length
    )
    if keeps:
        weight_slopes(mixture, sum32, logits, top, inverse32, log_total, spare, length)
        for k in range(call.teachers):
            products = dot(kept + k * row, spare, length)
            store(grad_weights, k, float32(squared * products * load(grad_weights, k)))
    return squared * (weight_sum * each + x_log_x(weight_sum))


@njit
def hard_part(call: Any, n: int, factor: float, top: float, logits: int, out: int, spare: int) -> float:
    """Return `factor` times the cross-entropy of one row to its labels and add its gradient to `out`."""
    length = lots(call.classes + LOT - 1)
    total = exponentials(logits, top, float32(LOG2_E), spare, length)
    lam = float_at(call.lam, n, 1.0)
    result = 0.0
    share_sum = 0.0
    for part in range(2):
        start, share = (call.labels, lam) if part == 0 else (call.second, 1 - lam)
        label = label_at(start, n, call.ignore_index)
        if label >= 0 and share != 0:
            result += share * (math.log(total) - (float64(load(logits, label)) - top))
            store(out, label, load(out, label) - float32(factor * share))
            share_sum += share
    add_scaled(spare, float32(factor * share_sum / total), out, length)
    return factor * result


@njit(inline="always")
def one_row(call: Any, teachers: Any, n: int, scratch: int) -> None:
    """Compute the loss and gradients of one row."""
    classes = call.classes
    length = lots(classes + LOT - 1)
    logits, out, rest = scratch, scratch + 4 * length, scratch + 8 * length
    row_weight = float_at(call.row_weight, n, 1.0)
    if call.grad_weights and (row_weight == 0 or call.soft_weight == 0):
        fill(call.grad_weights, n * call.teachers, (n + 1) * call.teachers, float32(0))
    if row_weight == 0 or call.soft_weight == 0:
        fill(out, 0, length, float32(0))
    value = 0.0
    if row_weight != 0:
        top = read_dense(call.student_kind, call.student, n * call.student_stride, classes, logits)
        prefetch_row(call.student_kind, call.student, (n + 1) * call.student_stride, classes)
        if call.soft_weight != 0:
            value = soft_part(call, teachers, n, row_weight * call.soft_weight, top, logits, out, rest)
        if call.hard_weight != 0:
            value += hard_part(call, n, row_weight * call.hard_weight, top, logits, out, rest)
    store(call.loss, n, float32(value))
    index = n * classes
    if not call.grad:
        return
    if call.grad_scale != 1:
        scale(out, float32(call.grad_scale), length)
    if call.student_kind == FLOAT32:
        write_float32(out, call.grad + 4 * index, classes)
    elif call.student_kind == FLOAT16:
        write_half(out, call.grad + 2 * index, classes)
    else:
        write_bfloat16(out, call.grad + 2 * index, classes)


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Compute losses and gradients of the rows of a call: see `jit_call.each_row`."""
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            each_row(data, one_row)

    return run


run = _entry(SOURCES)
