"""The part of a row of the fused loss that is the same for every divergence, compiled.

Imported at first use: numba is slow to import.
"""

from __future__ import annotations

import math
from typing import Any

from coursepack.kernels.cpu.jit_base import float32, float64, njit
from coursepack.kernels.cpu.jit_call import float_at, label_at
from coursepack.kernels.cpu.jit_convert import LOT, fill, lots, write_bfloat16, write_float32, write_half
from coursepack.kernels.cpu.jit_math import LOG2_E, load, store
from coursepack.kernels.cpu.jit_softmax import add_scaled, exponentials
from coursepack.kernels.cpu.jit_teacher import read_dense, row_place
from coursepack.kernels.cpu.layout import FLOAT16, FLOAT32


@njit
def student_row(call: Any, n: int) -> tuple[int, int]:
    """Return the address and the bytes of a row of the student's logits."""
    return row_place(call.student_kind, call.student, n * call.student_stride, call.classes)


@njit
def grad_row(call: Any, n: int) -> tuple[int, int]:
    """Return the address and the bytes of a row of the gradient, no bytes if none is wanted."""
    return row_place(call.student_kind, call.grad, n * call.classes, call.classes if call.grad else 0)


@njit
def hard_part(call: Any, n: int, factor: float, top: float, logits: int, out: int, spare: int) -> float:
    """Return `factor` times the cross-entropy of one row to its labels and add its gradient to `out`."""
    length = lots(call.classes + LOT - 1)
    total = exponentials(logits, top, float32(LOG2_E), spare, length, out, 0)
    slope = factor * call.grad_scale
    lam = float_at(call.lam, n, 1.0)
    result = 0.0
    share_sum = 0.0
    for part in range(2):
        start, share = (call.labels, lam) if part == 0 else (call.second, 1 - lam)
        label = label_at(start, n, call.ignore_index)
        if label >= 0 and share != 0:
            result += share * (math.log(total) - (float64(load(logits, label)) - top))
            store(out, label, load(out, label) - float32(slope * share))
            share_sum += share
    add_scaled(spare, float32(slope * share_sum / total), out, length)
    return factor * result


def row_function(soft_part: Any) -> Any:
    """Make the function of one row from that of its divergence.

    `soft_part(call, teachers, n, factor, top, logits, out, scratch)` returns `factor` times T² D of row n and
    writes `grad_scale` times the gradient with respect to the student to `out`. `logits` are the student's,
    `top` is the largest of them, and `scratch` is the start of the working rows.
    """

    @njit(inline="always")
    def one_row(call: Any, teachers: Any, n: int, stop: int, scratch: int) -> None:
        """Compute the loss and gradients of one row."""
        classes = call.classes
        length = lots(classes + LOT - 1)
        logits, out, rest = scratch, scratch + 4 * length, scratch + 8 * length
        # With its padding, over which this thread will write gradients of the rows before `stop`.
        is_in_place = (
            call.grad != 0 and call.student_kind == FLOAT32 and n * classes + length <= stop * classes
        )
        if is_in_place:
            out = call.grad + 4 * n * classes
        row_weight = float_at(call.row_weight, n, 1.0)
        if call.grad_weights and (row_weight == 0 or call.soft_weight == 0):
            fill(call.grad_weights, n * call.teachers, (n + 1) * call.teachers, float32(0))
        if row_weight == 0 or call.soft_weight == 0:
            fill(out, 0, length, float32(0))
        value = 0.0
        if row_weight != 0:
            top = read_dense(call.student_kind, call.student, n * call.student_stride, classes, logits)
            if call.soft_weight != 0:
                value = soft_part(call, teachers, n, row_weight * call.soft_weight, top, logits, out, rest)
            if call.hard_weight != 0:
                value += hard_part(call, n, row_weight * call.hard_weight, top, logits, out, rest)
        store(call.loss, n, float32(value))
        index = n * classes
        if is_in_place or not call.grad:
            return
        if call.student_kind == FLOAT32:
            write_float32(out, call.grad + 4 * index, classes)
        elif call.student_kind == FLOAT16:
            write_half(out, call.grad + 2 * index, classes)
        else:
            write_bfloat16(out, call.grad + 2 * index, classes)

    return one_row
