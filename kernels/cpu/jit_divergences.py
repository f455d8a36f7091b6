"""The fused loss for divergences other than KL(teachers || student), compiled.

Imported at first use: numba is slow to import. The structure is that of `jit_loss`, and the formulas are
those of `coursepack.kernels.divergences`. With the mixture as target, weights are not normalized.
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
from coursepack.kernels.cpu.jit_math import SUMS, TINY, divergence_term, load, log, store, wide_vectors
from coursepack.kernels.cpu.jit_row import grad_row, row_function, student_row
from coursepack.kernels.cpu.jit_softmax import BLOCK, add_scaled, block_end, dot, exponentials
from coursepack.kernels.cpu.jit_teacher import (
    factor_of,
    inverse_temperature,
    prefetch_start,
    teacher_exponentials,
    teacher_logits,
)
from coursepack.kernels.cpu.layout import JENSEN_SHANNON, REVERSE_KL, SQUARED_ERROR


@njit(fastmath=SUMS)
def reverse_kl(
    p: int,
    q: int,
    logits: int,
    top: float,
    inverse: float,
    log_total: float,
    scale_p: float,
    scale_q: float,
    slope: float,
    offset: float,
    out: int,
    length: int,
) -> float:
    """Return KL(`scale_q q` || `scale_p p`) and write `slope` times its gradient to `out`.

    The log of `scale_q q` is `(logits - top) inverse - log_total`. `offset` is 1 less the sum of `scale_p p`.
    """
    wide_vectors()
    total = 0.0
    for start in range(0, length, BLOCK):
        part = float32(0)
        for c in range(start, block_end(start, length)):
            other, own = scale_p * load(p, c), scale_q * load(q, c)
            log_q = (load(logits, c) - top) * inverse - log_total
            log_p = log(other if other > TINY else TINY)
            part += divergence_term(own, other, log_q, log_p)
            store(out, c, float32(0) if own == float32(0) else log_q - log_p)
        total += part
    total += offset
    mean = float32(total)
    for c in range(lots(length)):
        store(out, c, slope * (scale_q * load(q, c)) * (load(out, c) - mean))
    return total


@njit(fastmath=SUMS)
def jensen_shannon(
    p: int,
    q: int,
    logits: int,
    top: float,
    inverse: float,
    log_total: float,
    scale_p: float,
    scale_q: float,
    slope: float,
    out: int,
    length: int,
) -> float:
    """Return the divergence of `scale_q q` and `scale_p p`, and write `slope` times its gradient to `out`.

    The log of `scale_q q` is `(logits - top) inverse - log_total`.
    """
    wide_vectors()
    total, moment = 0.0, 0.0
    for start in range(0, length, BLOCK):
        part, other_part = float32(0), float32(0)
        for c in range(start, block_end(start, length)):
            other, own = scale_p * load(p, c), scale_q * load(q, c)
            middle = float32(0.5) * (own + other)
            log_q = (load(logits, c) - top) * inverse - log_total
            log_p = log(other if other > TINY else TINY)
            log_m = log(middle if middle > TINY else TINY)
            ratio = float32(0) if own == float32(0) else log_q - log_m
            part += divergence_term(own, middle, log_q, log_m) + divergence_term(other, middle, log_p, log_m)
            other_part += own * ratio
            store(out, c, ratio)
        total += part
        moment += other_part
    # A NaN of the target, which the clamped logarithms hide, is in the total.
    mean, half = float32(moment if total == total else total), float32(0.5) * slope
    for c in range(lots(length)):
        store(out, c, half * (scale_q * load(q, c)) * (load(out, c) - mean))
    return 0.5 * total


@njit(fastmath=SUMS)
def squared_error(t: int, logits: int, inverse: float, slope: float, out: int, classes: int) -> float:
    """Return the mean of `(logits inverse - t)²`, and write `slope` times its gradient to `out`."""
    wide_vectors()
    factor = slope * float32(2 / classes)
    total = 0.0
    for start in range(0, classes, BLOCK):
        part = float32(0)
        for c in range(start, start + BLOCK if start + BLOCK < classes else classes):
            difference = load(logits, c) * inverse - load(t, c)
            part += difference * difference
            store(out, c, factor * difference)
        total += part
    return total / classes


@njit
def compare(
    call: Any,
    p: int,
    q: int,
    logits: int,
    top: float,
    inverse: float,
    log_total: float,
    scale_p: float,
    scale_q: float,
    slope: float,
    offset: float,
    out: int,
    length: int,
) -> float:
    """Return D of a target `scale_p p`, and write `slope` times its gradient to `out`."""
    if call.divergence == REVERSE_KL:
        return reverse_kl(p, q, logits, top, inverse, log_total, scale_p, scale_q, slope, offset, out, length)
    if call.divergence == JENSEN_SHANNON:
        return jensen_shannon(p, q, logits, top, inverse, log_total, scale_p, scale_q, slope, out, length)
    fill(out, call.classes, length, float32(0))
    return squared_error(p, logits, inverse, slope, out, call.classes)


@njit(fastmath=SUMS)
def target_slopes(
    kind: int, t: int, q: int, logits: int, inverse: float, scale_q: float, classes: int, out: int
) -> None:
    """Write dD/dt of a target `t` to `out`."""
    wide_vectors()
    if kind == REVERSE_KL:
        for c in range(classes):
            value = load(t, c)
            store(out, c, -(scale_q * load(q, c)) / value if value >= TINY else float32(0))
    elif kind == JENSEN_SHANNON:
        for c in range(classes):
            value = load(t, c)
            middle = float32(0.5) * (value + scale_q * load(q, c))
            log_t, log_m = log(value if value > TINY else TINY), log(middle if middle > TINY else TINY)
            store(out, c, float32(0.5) * (log_t - log_m))
    else:
        factor = float32(-2 / classes)
        for c in range(classes):
            store(out, c, factor * (load(logits, c) * inverse - load(t, c)))


@njit(inline="always")
def soft_part(
    call: Any, teachers: Any, n: int, factor: float, top: float, logits: int, out: int, scratch: int
) -> float:
    """Compute the divergence of one row and its gradients, see `jit_row.row_function`."""
    length = lots(call.classes + LOT - 1)
    row = 4 * length
    student, spare, target, kept = scratch, scratch + row, scratch + 2 * row, scratch + 3 * row
    temperature = temperature_at(call, n)
    inverse = inverse_temperature(temperature)
    ahead, size = student_row(call, n + 1)
    prefetch_start(ahead, size)
    of_logits = call.divergence == SQUARED_ERROR
    total = 1.0
    if not of_logits:
        ahead, size = grad_row(call, n)
        total = exponentials(logits, top, factor_of(inverse), student, length, ahead, size)
    inverse32, log_total, scale_q = float32(inverse), float32(math.log(total)), float32(1 / total)
    label = label_at(call.labels, n, call.ignore_index) if not call.second else -1
    squared = factor * temperature * temperature
    slope = float32(factor * temperature * call.grad_scale)
    mixes = call.combine == 0
    keeps = call.grad_weights and mixes
    grad_weights = call.grad_weights + 4 * n * call.teachers
    result, weight_sum = 0.0, 0.0
    fill(target if mixes else out, 0, length, float32(0))
    for k in range(call.teachers):
        values = kept + k * row if keeps else kept
        own, weight = teacher_temperature_at(call, teachers[k], n), weight_at(call, n, k)
        weight_sum += weight
        sum_p = 1.0
        if of_logits:
            teacher_logits(teachers[k], n, label, call.classes, length, own, spare, values)
        else:
            sum_p = teacher_exponentials(
                teachers[k], n, label, call.classes, length, own, call.smoothing, spare, values
            )
        if mixes:
            add_scaled(values, float32(weight / sum_p), target, length)
            if keeps:
                store(grad_weights, k, float32(1 / sum_p))
            continue
        each = compare(
            call, values, student, logits, top, inverse32, log_total, float32(1 / sum_p), scale_q, slope,
            0.0, spare, length,
        )  # fmt: skip
        add_scaled(spare, float32(weight), out, length)
        if weight != 0:
            result += weight * each
        if call.grad_weights:
            store(grad_weights, k, float32(squared * each))
    if not mixes:
        return squared * result
    result = compare(
        call, target, student, logits, top, inverse32, log_total, float32(1), scale_q, slope,
        1 - weight_sum, out, length,
    )  # fmt: skip
    if keeps:
        fill(spare, call.classes, length, float32(0))
        target_slopes(call.divergence, target, student, logits, inverse32, scale_q, call.classes, spare)
        for k in range(call.teachers):
            # A NaN, which the clamped logarithms hide, is in the result.
            products = dot(kept + k * row, spare, length) if result == result else result
            store(grad_weights, k, float32(squared * products * load(grad_weights, k)))
    return squared * result


one_row = row_function(soft_part)


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Compute losses and gradients of the rows of a call: see `jit_call.each_row`."""
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            each_row(data, one_row)

    return run


run = _entry(SOURCES)
