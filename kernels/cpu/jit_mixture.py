"""The mixture of teacher probabilities, compiled. Imported at first use: numba is slow to import."""

from __future__ import annotations

from typing import Any

from coursepack.kernels.cpu.jit_base import SOURCES, compiled, float32, njit, types
from coursepack.kernels.cpu.jit_call import each_row, label_at, teacher_temperature_at, weight_at
from coursepack.kernels.cpu.jit_convert import LOT, fill, lots, write_float32
from coursepack.kernels.cpu.jit_softmax import add_scaled
from coursepack.kernels.cpu.jit_teacher import teacher_exponentials


@njit(inline="always")
def one_row(call: Any, teachers: Any, n: int, stop: int, scratch: int) -> None:
    """Compute the mixture of one row."""
    classes = call.classes
    length = lots(classes + LOT - 1)
    spare, probs, mixture = scratch, scratch + 4 * length, scratch + 8 * length
    label = label_at(call.labels, n, call.ignore_index)
    fill(mixture, 0, length, float32(0))
    for k in range(call.teachers):
        own = teacher_temperature_at(call, teachers[k], n)
        size = teacher_exponentials(teachers[k], n, label, classes, length, own, call.smoothing, spare, probs)
        add_scaled(probs, float32(weight_at(call, n, k) / size), mixture, length)
    write_float32(mixture, call.grad + 4 * n * classes, classes)


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """Compute the mixture of every row into the field `grad`."""
        if sources != 0:  # always: a part of the key that numba finds compiled code by
            each_row(data, one_row)

    return run


run = _entry(SOURCES)
