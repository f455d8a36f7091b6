"""Statistics of teacher rows, compiled. Imported at first use: numba is slow to import."""

from __future__ import annotations

import math
from typing import Any

from coursepack.kernels.cpu.jit_base import SOURCES, compiled, float32, float64, njit, types
from coursepack.kernels.cpu.jit_call import each_row, label_at
from coursepack.kernels.cpu.jit_convert import LOT, fill, lots
from coursepack.kernels.cpu.jit_math import (
    LOG2_E,
    load,
    store,
    store_int64,
    store_uint8,
)
from coursepack.kernels.cpu.jit_softmax import dot, exponentials, moment
from coursepack.kernels.cpu.jit_teacher import read_dense, read_row

NO_NORM = 1e-8
"""Lower bound of a norm in a cosine, as in `torch.cosine_similarity`."""


@njit
def first_top(logits: int, top: float, classes: int) -> int:
    """Return the lowest class with the largest logit, or the lowest with a NaN if there is one."""
    for c in range(classes):
        value = load(logits, c)
        if value != value:
            return c
    for c in range(classes):
        if load(logits, c) == top:
            return c
    return 0


@njit(inline="always")
def one_row(call: Any, teachers: Any, n: int, stop: int, scratch: int) -> None:
    """Compute the statistics of every teacher for one row."""
    classes, count = call.classes, call.teachers
    length = lots(classes + LOT - 1)
    logits, probs, student = scratch, scratch + 4 * length, scratch + 8 * length
    student_norm = 0.0
    if call.student:
        read_dense(call.student_kind, call.student, n * call.student_stride, classes, student)
        fill(student, classes, length, float32(0))
        student_norm = max(math.sqrt(dot(student, student, length)), NO_NORM)
    label = label_at(call.labels, n, call.ignore_index)
    for k in range(count):
        index, each = k * call.rows + n, count * call.rows
        top = read_row(teachers[k], n, classes, length, 1.0, probs, logits)
        total = exponentials(logits, top, float32(LOG2_E), probs, length, logits, 0)
        store_int64(call.grad_weights, index, first_top(logits, top, classes))
        entropy = math.log(total) - moment(probs, logits, top, length) / total
        fill(logits, classes, length, float32(0))
        norm = math.sqrt(dot(logits, logits, length))
        store(call.loss, index, float32(entropy))
        store(call.loss, each + index, float32(norm))
        if call.labels:
            loss, correct = 0.0, 0
            if label >= 0:
                loss = math.log(total) - (float64(load(logits, label)) - top)
                correct = 1 if load(logits, label) >= top and total == total else 0
            store(call.loss, 2 * each + index, float32(loss))
            store_uint8(call.grad, index, correct)
        if call.student:
            cosine = dot(logits, student, length) / (max(norm, NO_NORM) * student_norm)
            store(call.loss, 3 * each + index, float32(cosine))


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Compute statistics of every row.

        The field `loss` receives entropies, norms, cross-entropies and cosines, each `(K, N)` float32;
        `grad_weights` the top classes `(K, N)` int64; `grad` one byte `(K, N)`, 1 if the teacher is right.
        """
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            each_row(data, one_row)

    return run


run = _entry(SOURCES)
