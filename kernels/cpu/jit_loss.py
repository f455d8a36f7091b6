"""The fused loss for the rows of a batch, compiled. Imported at first use: numba is slow to import.

Rows are processed one at a time: the student's softmax, then for each teacher decoding, softening and
adjusting, then the mixture, the divergence and both gradients. A thread holds only a few float32 rows,
whatever N and K. The formulas are those of `coursepack.kernels.analytic`.

Rows are independent and summed in a fixed order, so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

from coursepack.kernels.cpu.jit_base import SOURCES, compiled, float32, njit, types
from coursepack.kernels.cpu.jit_call import (
    each_row,
    label_at,
    teacher_temperature_at,
    temperature_at,
    weight_at,
)
from coursepack.kernels.cpu.jit_convert import LOT, fill, lots
from coursepack.kernels.cpu.jit_math import load, store
from coursepack.kernels.cpu.jit_row import grad_row, row_function, student_row
from coursepack.kernels.cpu.jit_softmax import (
    add_both_scaled,
    add_scaled,
    divergence,
    dot,
    exponentials,
    weight_slopes,
)
from coursepack.kernels.cpu.jit_teacher import (
    decode,
    factor_of,
    inverse_temperature,
    soften,
)


@njit
def x_log_x(x: float) -> float:
    """Return x log x, 0 at 0."""
    # As a rule x is 1, and the comparison takes less time than the logarithm.
    return x * math.log(x) if x > 0 and x != 1 else 0.0


@njit(inline="always")
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
    ahead, size = grad_row(call, n)
    total = exponentials(logits, top, factor_of(inverse), student, length, ahead, size)
    inverse32, log_total, scale_q = float32(inverse), float32(math.log(total)), float32(1 / total)
    label = label_at(call.labels, n, call.ignore_index) if not call.second else -1
    squared = factor * temperature * temperature
    slope = float32(factor * temperature * call.grad_scale)
    mixes = call.combine == 0
    keeps = call.grad_weights and mixes
    grad_weights = call.grad_weights + 4 * n * call.teachers
    weight_sum = 0.0
    for k in range(call.teachers):
        weight_sum += weight_at(call, n, k)
    result = 0.0
    scale_p = float32(1)
    if keeps or not mixes:
        fill(mixture if mixes else out, 0, length, float32(0))
    ahead, size = student_row(call, n + 1)
    free = out if mixes else mixture
    own = teacher_temperature_at(call, teachers[0], n)
    top_p = decode(teachers[0], n, label, call.classes, length, own, free, spare)
    for k in range(call.teachers):
        is_first = mixes and not keeps and k == 0
        probs = kept + k * row if keeps else mixture if is_first else kept
        weight = weight_at(call, n, k)
        sum_p = soften(teachers[k], n, label, call.classes, length, own, call.smoothing, top_p, spare, probs)
        if k + 1 < call.teachers:
            # Here, because the CPU can begin with it before it knows the sum.
            own = teacher_temperature_at(call, teachers[k + 1], n)
            top_p = decode(teachers[k + 1], n, label, call.classes, length, own, free, spare)
        if mixes:
            # The mixture is normalized to a sum of one.
            share = weight / weight_sum if weight_sum > 0 else 0.0
            if is_first:
                scale_p = float32(share / sum_p)
            else:
                add_both_scaled(probs, float32(share / sum_p), scale_p, mixture, length)
                scale_p = float32(1)
            if keeps:
                store(grad_weights, k, float32(1 / sum_p))
            continue
        each = divergence(
            probs,
            student,
            logits,
            top,
            inverse32,
            log_total,
            float32(1 / sum_p),
            scale_q,
            slope,
            mixture,
            length,
            ahead,
            size if k == 0 else 0,
        )
        add_scaled(mixture, float32(weight), out, length)
        if weight != 0:
            result += weight * each
        if call.grad_weights:
            store(grad_weights, k, float32(squared * each))
    if not mixes:
        return squared * result
    sum32 = float32(weight_sum)
    each = divergence(
        mixture,
        student,
        logits,
        top,
        inverse32,
        log_total,
        scale_p,
        scale_q,
        slope * sum32,
        out,
        length,
        ahead,
        size,
    )
    if keeps:
        weight_slopes(mixture, sum32, logits, top, inverse32, log_total, spare, length)
        for k in range(call.teachers):
            products = dot(kept + k * row, spare, length)
            store(grad_weights, k, float32(squared * products * load(grad_weights, k)))
    return squared * (weight_sum * each + x_log_x(weight_sum))


one_row = row_function(soft_part)


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Compute losses and gradients of the rows of a call: see `jit_call.each_row`."""
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            each_row(data, one_row)

    return run


run = _entry(SOURCES)
