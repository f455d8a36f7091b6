"""The fused loss for rows of a batch, compiled. Loaded at first use: importing numba is slow.

One row at a time: the student's softmax, then each teacher's row from the form it is stored in to softened
and adjusted probabilities, their mixture, the divergence and both gradients. Only a few rows of float32 per
thread are ever held, whatever N and K. Formulas are those of `coursepack.kernels.analytic`.

Rows are independent and each is summed in a fixed order, so results do not depend on threads. Addresses
come from `coursepack.kernels.native`, which has checked every shape; values that could lead outside or have
no meaning (labels, ids, temperatures, weights) are checked here, and the first bad row is reported.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from coursepack.kernels.call import CALL, CALL_BYTES, FLOAT16, FLOAT32, TEACHER, TOPK
from coursepack.kernels.jit_base import carray, compiled, float32, int64, njit, types
from coursepack.kernels.jit_convert import fill, write_bfloat16, write_float32, write_half
from coursepack.kernels.jit_math import LOG2_E, address, address_of, take_ticket
from coursepack.kernels.jit_softmax import add_scaled, divergence, dot, exponentials, weight_slopes
from coursepack.kernels.jit_teacher import (
    factor_of,
    ids_are_classes,
    inverse_temperature,
    read_dense,
    teacher_exponentials,
)

MAX_TEMPERATURE = 100.0


@njit(inline="always")
def float_at(start: int, n: int, otherwise: float) -> float:
    """The n-th float32 at an address, as float64; or the other value, where there is no address."""
    return np.float64(carray(address(start + 4 * n), (1,), float32)[0]) if start else otherwise


@njit(inline="always")
def temperature_at(record: Any, n: int) -> float:
    """The temperature of a student or teacher in a row, from the call's record or the teacher's."""
    return float_at(record.temperature, n * record.temperature_stride, record.fixed_temperature)


@njit(inline="always")
def label_at(start: int, n: int, ignore_index: int) -> int:
    """The n-th label at an address; -1 where it is to be ignored, or there is none."""
    if not start:
        return -1
    label = carray(address(start + 8 * n), (1,), int64)[0]
    return -1 if label == ignore_index else label


@njit(inline="always")
def weight_at(call: Any, n: int, k: int) -> float:
    """The weight of a teacher in a row."""
    if not call.weights:
        return 1 / call.teachers
    place = n * call.weights_row + k * call.weights_column
    return carray(address(call.weights + 8 * place), (1,), np.float64)[0]


@njit(inline="always")
def wrong_label(start: int, n: int, call: Any) -> bool:
    """Whether a label is no class and not to be ignored either."""
    if not start:
        return False
    label = carray(address(start + 8 * n), (1,), int64)[0]
    return label != call.ignore_index and (label < 0 or label >= call.classes)


@njit
def is_bad(call: Any, teachers: Any, n: int) -> bool:
    """Whether a row holds a value that is not allowed. Logits are not looked at."""
    if wrong_label(call.labels, n, call) or wrong_label(call.second, n, call):
        return True
    temperature, lam = temperature_at(call, n), float_at(call.lam, n, 1.0)
    row_weight = float_at(call.row_weight, n, 1.0)
    if not (0 < temperature <= MAX_TEMPERATURE and 0 <= lam <= 1 and row_weight == row_weight):
        return True
    for k in range(call.teachers):
        teacher = teachers[k]
        if not 0 < temperature_at(teacher, n) <= MAX_TEMPERATURE or not weight_at(call, n, k) >= 0:
            return True
        if row_weight != 0 and teacher.kind == TOPK and not ids_are_classes(teacher, n, call.classes):
            return True
    return False


@njit
def x_log_x(x: float) -> float:
    """x log x, 0 at 0."""
    return x * math.log(x) if x > 0 else 0.0


@njit
def soft_part(
    call: Any,
    teachers: Any,
    n: int,
    factor: float,
    weight_sum: float,
    top: float,
    logits: np.ndarray,
    student: np.ndarray,
    spare: np.ndarray,
    out: np.ndarray,
    scratch: np.ndarray,
) -> float:
    """`factor` times T² D of one row; its gradient to the student goes to `out`.

    `logits` are the student's and `top` the largest; `student`, `spare` and `scratch` are room to work in.
    """
    temperature = temperature_at(call, n)
    inverse = inverse_temperature(temperature)
    total = exponentials(logits, top, factor_of(inverse), student)
    inverse32, log_total, scale_q = float32(inverse), float32(math.log(total)), float32(1 / total)
    label = label_at(call.labels, n, call.ignore_index) if not call.second else -1
    grad_weights = carray(address(call.grad_weights), (call.rows, call.teachers), float32)
    squared = factor * temperature * temperature
    length = len(logits)
    slope = float32(factor * temperature)
    keeps = call.grad_weights and call.combine == 0
    mixture = scratch[:length]
    fill(mixture if call.combine == 0 else out, 0, float32(0))
    result = 0.0
    for k in range(call.teachers):
        place = (k + 2 if keeps else 1) * length
        probs = scratch[place : place + length]
        own = temperature_at(teachers[k], n)
        size = teacher_exponentials(teachers[k], n, label, call.classes, own, call.smoothing, spare, probs)
        weight = weight_at(call, n, k)
        if call.combine == 0:
            # Of the mixture brought to a sum of one.
            share = weight / weight_sum if weight_sum > 0 else 0.0
            add_scaled(probs, float32(share / size), mixture)
            if keeps:
                grad_weights[n, k] = 1 / size
        else:
            each = divergence(
                probs, student, logits, top, inverse32, log_total, float32(1 / size), scale_q, slope, spare
            )
            add_scaled(spare, float32(weight), out)
            if weight != 0:
                result += weight * each
            if call.grad_weights:
                grad_weights[n, k] = squared * each
    if call.combine == 0:
        one, sum32 = float32(1), float32(weight_sum)
        each = divergence(
            mixture, student, logits, top, inverse32, log_total, one, scale_q, slope * sum32, out
        )
        result = weight_sum * each + x_log_x(weight_sum)
        if keeps:
            weight_slopes(mixture, sum32, logits, top, inverse32, log_total, spare)
            for k in range(call.teachers):
                probs = scratch[(k + 2) * length : (k + 3) * length]
                grad_weights[n, k] *= squared * dot(probs, spare)
    return squared * result


@njit
def hard_part(
    call: Any, n: int, factor: float, top: float, logits: np.ndarray, spare: np.ndarray, out: np.ndarray
) -> float:
    """`factor` times the cross-entropy of one row to its labels; its gradient is added to `out`."""
    total = exponentials(logits, top, float32(LOG2_E), spare)
    lam = float_at(call.lam, n, 1.0)
    result = 0.0
    share_sum = 0.0
    for part in range(2):
        start, share = (call.labels, lam) if part == 0 else (call.second, 1 - lam)
        label = label_at(start, n, call.ignore_index)
        if label >= 0 and share != 0:
            result += share * (math.log(total) - (np.float64(logits[label]) - top))
            out[label] -= float32(factor * share)
            share_sum += share
    add_scaled(spare, float32(factor * share_sum / total), out)
    return factor * result


@njit
def finish_row(call: Any, n: int, values: np.ndarray) -> None:
    """Write the gradient of a row in the student's dtype."""
    place, classes = n * call.classes, call.classes
    if call.student_kind == FLOAT32:
        write_float32(values, carray(address(call.grad + 4 * place), (classes,), float32))
        return
    codes = carray(address(call.grad + 2 * place), (classes,), np.uint16)
    if call.student_kind == FLOAT16:
        write_half(values, codes)
    else:
        write_bfloat16(values, codes)


@njit
def one_row(call: Any, teachers: Any, n: int, scratch: np.ndarray) -> None:
    """Loss and gradients of one row."""
    classes = call.classes
    length = (classes + 63) >> 6 << 6
    logits, student = scratch[:length], scratch[length : 2 * length]
    spare, out = scratch[2 * length : 3 * length], scratch[3 * length : 4 * length]
    row_weight = float_at(call.row_weight, n, 1.0)
    loss = carray(address(call.loss), (call.rows,), float32)
    if call.grad_weights and (row_weight == 0 or call.soft_weight == 0):
        fill(
            carray(address(call.grad_weights + 4 * n * call.teachers), (call.teachers,), float32),
            0,
            float32(0),
        )
    if row_weight == 0:
        loss[n] = 0
        fill(out, 0, float32(0))
    else:
        top = read_dense(call.student_kind, call.student, n * call.student_stride, classes, logits)
        value = 0.0
        if call.soft_weight != 0:
            weight_sum = 0.0
            for k in range(call.teachers):
                weight_sum += weight_at(call, n, k)
            factor = row_weight * call.soft_weight
            value = soft_part(
                call, teachers, n, factor, weight_sum, top, logits, student, spare, out, scratch[4 * length :]
            )
        else:
            fill(out, 0, float32(0))
        if call.hard_weight != 0:
            value += hard_part(call, n, row_weight * call.hard_weight, top, logits, spare, out)
        loss[n] = value
    if call.grad:
        finish_row(call, n, out)


@compiled(types.void(types.voidptr))
def run(data: Any) -> None:
    """Take chunks of rows until none is left: what every thread does.

    `data` points to a CALL record with TEACHER records behind it.
    """
    call = carray(data, (1,), CALL)[0]
    teachers = carray(address(address_of(data) + CALL_BYTES), (call.teachers,), TEACHER)
    slot = take_ticket(call.state + 8)
    scratch = carray(address(call.scratch + 4 * slot * call.scratch_stride), (call.scratch_stride,), float32)
    state = carray(address(call.state), (3,), int64)
    start = take_ticket(call.state) * call.chunk
    while start < call.rows and state[2] == 0:
        for n in range(start, min(start + call.chunk, call.rows)):
            if is_bad(call, teachers, n):
                state[2] = n + 1
                return
            one_row(call, teachers, n, scratch)
        start = take_ticket(call.state) * call.chunk
