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
from coursepack.kernels.cpu.jit_call import each_row, label_at, temperature_at, weight_at
from coursepack.kernels.cpu.jit_convert import LOT, fill, lots
from coursepack.kernels.cpu.jit_math import load, store
from coursepack.kernels.cpu.jit_row import row_function
from coursepack.kernels.cpu.jit_softmax import add_scaled, divergence, dot, exponentials, weight_slopes
from coursepack.kernels.cpu.jit_teacher import (
    factor_of,
    inverse_temperature,
    prefetch_row,
    teacher_exponentials,
)


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


one_row = row_function(soft_part)


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Compute losses and gradients of the rows of a call: see `jit_call.each_row`."""
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            each_row(data, one_row)

    return run


run = _entry(SOURCES)
