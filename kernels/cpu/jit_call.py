"""Access to a call's records, and the loop over its rows, compiled. Imported at first use, as numba is slow.

Addresses come from `coursepack.kernels.cpu.native`, which has checked every shape; values that could lead
outside or have no meaning (labels, ids, temperatures, weights) are checked here, and the first bad row is
reported.
"""

from __future__ import annotations

from typing import Any

from coursepack.kernels.cpu.jit_base import carray, float64, njit
from coursepack.kernels.cpu.jit_math import (
    address,
    load,
    load_double,
    load_integer,
    pointer,
    store_integer,
    take_ticket,
)
from coursepack.kernels.cpu.jit_teacher import ids_are_classes
from coursepack.kernels.cpu.layout import CALL, CALL_BYTES, TEACHER, TOPK

MAX_TEMPERATURE = 100.0


@njit(forceinline=True)
def float_at(start: int, n: int, otherwise: float) -> float:
    """The n-th float32 at an address, as float64; or the other value, where there is no address."""
    return float64(load(start, n)) if start else otherwise


@njit(forceinline=True)
def temperature_at(record: Any, n: int) -> float:
    """The temperature of a student or teacher in a row, from the call's record or the teacher's."""
    return float_at(record.temperature, n * record.temperature_stride, record.fixed_temperature)


@njit(forceinline=True)
def label_at(start: int, n: int, ignore_index: int) -> int:
    """The n-th label at an address; -1 where it is to be ignored, or there is none."""
    if not start:
        return -1
    label = load_integer(start, n)
    return -1 if label == ignore_index else label


@njit(forceinline=True)
def weight_at(call: Any, n: int, k: int) -> float:
    """The weight of a teacher in a row."""
    if not call.weights:
        return 1 / call.teachers
    place = n * call.weights_row + k * call.weights_column
    return load_double(call.weights, place)


@njit(forceinline=True)
def wrong_label(start: int, n: int, call: Any) -> bool:
    """Whether a label is no class and not to be ignored either."""
    if not start:
        return False
    label = load_integer(start, n)
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


@njit(inline="always")
def each_row(data: Any, one_row: Any) -> None:
    """Take chunks of rows until none is left, and call `one_row` for each. Every thread runs this.

    Args:
        data: pointer to a CALL record with TEACHER records behind it.
        one_row: compiled function of the call, the teachers, a row and the thread's scratch memory.
    """
    call = carray(data, (1,), CALL)[0]
    teachers = carray(pointer(address(data) + CALL_BYTES), (call.teachers,), TEACHER)
    scratch = call.scratch + 4 * call.scratch_stride * take_ticket(call.state + 8)
    start = take_ticket(call.state) * call.chunk
    while start < call.rows and load_integer(call.state, 2) == 0:
        for n in range(start, start + call.chunk if start + call.chunk < call.rows else call.rows):
            if is_bad(call, teachers, n):
                store_integer(call.state, 2, n + 1)
                return
            one_row(call, teachers, n, scratch)
        start = take_ticket(call.state) * call.chunk
