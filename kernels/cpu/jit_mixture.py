"""The mixture of teachers' probabilities, compiled. Loaded at first use: importing numba is slow."""

from __future__ import annotations

from typing import Any

from coursepack.kernels.cpu.jit_base import SOURCES, carray, compiled, float32, njit, types
from coursepack.kernels.cpu.jit_convert import LOT, fill, lots, write_float32
from coursepack.kernels.cpu.jit_loss import is_bad, label_at, temperature_at, weight_at
from coursepack.kernels.cpu.jit_math import address, load_integer, pointer, store_integer, take_ticket
from coursepack.kernels.cpu.jit_softmax import add_scaled
from coursepack.kernels.cpu.jit_teacher import teacher_exponentials
from coursepack.kernels.cpu.layout import CALL, CALL_BYTES, TEACHER


@njit(inline="always")
def one_row(call: Any, teachers: Any, n: int, scratch: int) -> None:
    """The mixture of one row."""
    classes = call.classes
    length = lots(classes + LOT - 1)
    spare, probs, mixture = scratch, scratch + 4 * length, scratch + 8 * length
    label = label_at(call.labels, n, call.ignore_index)
    fill(mixture, 0, length, float32(0))
    for k in range(call.teachers):
        own = temperature_at(teachers[k], n)
        size = teacher_exponentials(teachers[k], n, label, classes, length, own, call.smoothing, spare, probs)
        add_scaled(probs, float32(weight_at(call, n, k) / size), mixture, length)
    write_float32(mixture, call.grad + 4 * n * classes, classes)


def _entry(sources: int) -> Any:
    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        """As `jit_loss.run`; the mixture goes to where that has the gradient."""
        if sources == 0:  # never: it is here to be part of what numba finds the compiled code by
            return
        call = carray(data, (1,), CALL)[0]
        teachers = carray(pointer(address(data) + CALL_BYTES), (call.teachers,), TEACHER)
        scratch = call.scratch + 4 * call.scratch_stride * take_ticket(call.state + 8)
        start = take_ticket(call.state) * call.chunk
        while start < call.rows and load_integer(call.state, 2) == 0:
            for n in range(start, min(start + call.chunk, call.rows)):
                if is_bad(call, teachers, n):
                    store_integer(call.state, 2, n + 1)
                    return
                one_row(call, teachers, n, scratch)
            start = take_ticket(call.state) * call.chunk

    return run


run = _entry(SOURCES)
