"""Facts about teachers' rows, compiled. Loaded at first use: importing numba is slow."""

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
    store_byte,
    store_integer,
)
from coursepack.kernels.cpu.jit_softmax import dot, exponentials, moment
from coursepack.kernels.cpu.jit_teacher import read_dense, read_row

NO_NORM = 1e-8
"""Norms are at least this in a cosine, as in `torch.cosine_similarity`."""


@njit
def first_top(logits: int, top: float, classes: int) -> int:
    """The lowest class with the largest logit; the lowest with a NaN where there is one."""
    for c in range(classes):
        value = load(logits, c)
        if value != value:
            return c
    for c in range(classes):
        if load(logits, c) == top:
            return c
    return 0


@njit(inline="always")
def one_row(call: Any, teachers: Any, n: int, scratch: int) -> None:
    """The facts of every teacher about one row."""
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
        place, each = k * call.rows + n, count * call.rows
        top = read_row(teachers[k], n, classes, length, 1.0, logits)
        total = exponentials(logits, top, float32(LOG2_E), probs, length)
        store_integer(call.grad_weights, place, first_top(logits, top, classes))
        entropy = math.log(total) - moment(probs, logits, top, length) / total
        fill(logits, classes, length, float32(0))
        norm = math.sqrt(dot(logits, logits, length))
        store(call.loss, place, float32(entropy))
        store(call.loss, each + place, float32(norm))
        if call.labels:
            loss, correct = 0.0, 0
            if label >= 0:
                loss = math.log(total) - (float64(load(logits, label)) - top)
                correct = 1 if load(logits, label) >= top and total == total else 0
            store(call.loss, 2 * each + place, float32(loss))
            store_byte(call.grad, place, correct)
        if call.student:
            cosine = dot(logits, student, length) / (max(norm, NO_NORM) * student_norm)
            store(call.loss, 3 * each + place, float32(cosine))


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Compute statistics of every row.

        Where `jit_loss.run` writes losses go entropies, norms, cross-entropies and cosines, each `(K, N)`;
        where it writes the gradient to the weights go the top classes, and in place of the gradient to the
        student one byte that is 1 if the teacher is right.
        """
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            each_row(data, one_row)

    return run


run = _entry(SOURCES)
