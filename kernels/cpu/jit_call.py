"""A call's records and the loop over its rows, compiled. Imported at first use: numba is slow to import.

Addresses come from `coursepack.kernels.cpu.native`, which has checked every shape; values that could lead
outside or have no meaning (labels, ids, temperatures, weights) are checked here, and the first bad row is
reported.
"""

from __future__ import annotations

from typing import Any

from coursepack.kernels.cpu.jit_base import carray, float32, float64, njit
from coursepack.kernels.cpu.jit_math import (
    address,
    fetch_add,
    load,
    load_float64,
    load_int64,
    pointer,
    store,
    store_int64,
)
from coursepack.kernels.cpu.jit_teacher import ids_are_classes
from coursepack.kernels.cpu.layout import CALL, CALL_BYTES, TEACHER, TOPK

MAX_TEMPERATURE = 100.0
SMALLEST_CHUNK = 4
"""Rows of a chunk that are worth the first of them, which nothing has prefetched."""


@njit(forceinline=True)
def float_at(start: int, n: int, otherwise: float) -> float:
    """Return the n-th float32 at an address as float64, or `otherwise` if the address is 0."""
    return float64(load(start, n)) if start else otherwise


@njit(forceinline=True)
def temperature_at(record: Any, n: int) -> float:
    """Return the temperature of row n from the call's record (student) or from a teacher's."""
    return float_at(record.temperature, n * record.temperature_stride, record.fixed_temperature)


@njit(forceinline=True)
def teacher_temperature_at(call: Any, teacher: Any, n: int) -> float:
    """Return the temperature of row n of a teacher, which may be that of the call."""
    has_own = teacher.temperature != 0 or teacher.fixed_temperature != 0
    return temperature_at(teacher, n) if has_own else temperature_at(call, n)


@njit(forceinline=True)
def label_at(start: int, n: int, ignore_index: int) -> int:
    """Return the n-th label at an address, or -1 if it is ignored or the address is 0."""
    if not start:
        return -1
    label = load_int64(start, n)
    return -1 if label == ignore_index else label


@njit(forceinline=True)
def weight_at(call: Any, n: int, k: int) -> float:
    """Return the weight of teacher k in row n."""
    if not call.weights:
        return 1 / call.teachers
    index = n * call.weights_row + k * call.weights_column
    return load_float64(call.weights, index)


@njit(forceinline=True)
def is_invalid_label(start: int, n: int, call: Any) -> bool:
    """True if a label is neither a class nor `ignore_index`."""
    if not start:
        return False
    label = load_int64(start, n)
    return label != call.ignore_index and (label < 0 or label >= call.classes)


@njit
def has_bad_value(call: Any, teachers: Any, n: int) -> bool:
    """True if a row has an invalid label, class id, temperature or weight. Logits are not checked."""
    if is_invalid_label(call.labels, n, call) or is_invalid_label(call.second, n, call):
        return True
    temperature, lam = temperature_at(call, n), float_at(call.lam, n, 1.0)
    row_weight = float_at(call.row_weight, n, 1.0)
    if not (0 < temperature <= MAX_TEMPERATURE and 0 <= lam <= 1 and row_weight == row_weight):
        return True
    for k in range(call.teachers):
        teacher = teachers[k]
        if (
            not 0 < teacher_temperature_at(call, teacher, n) <= MAX_TEMPERATURE
            or not weight_at(call, n, k) >= 0
        ):
            return True
        if row_weight != 0 and teacher.kind == TOPK and not ids_are_classes(teacher, n, call.classes):
            return True
    return False


@njit
def added_up(values: int, count: int) -> float:
    """Return the sum of float32 numbers, added in their order."""
    total = 0.0
    for n in range(count):
        total += float64(load(values, n))
    return total


@njit
def next_chunk(call: Any) -> int:
    """Return the number of rows to take next: fewer as fewer are left, so that threads end together."""
    size = (call.rows - load_int64(call.state, 0)) // call.shares
    return size if size > SMALLEST_CHUNK else SMALLEST_CHUNK


@njit(inline="always")
def each_row(data: Any, one_row: Any) -> None:
    """Take chunks of rows until none is left and call `one_row` for each row. Every thread runs this.

    Args:
        data: pointer to a CALL record with TEACHER records behind it.
        one_row: compiled function of the call, the teachers, a row, the row up to which this thread goes on,
            and the thread's scratch memory.
    """
    call = carray(data, (1,), CALL)[0]
    teachers = carray(pointer(address(data) + CALL_BYTES), (call.teachers,), TEACHER)
    scratch = call.scratch + 4 * call.scratch_stride * fetch_add(call.state + 8, 1)
    size = next_chunk(call)
    start = fetch_add(call.state, size)
    while start < call.rows and load_int64(call.state, 2) == 0:
        stop = start + size if start + size < call.rows else call.rows
        for n in range(start, stop):
            if has_bad_value(call, teachers, n):
                store_int64(call.state, 2, n + 1)
                return
            one_row(call, teachers, n, stop, scratch)
        count = stop - start
        if call.total and fetch_add(call.state + 24, count) == call.rows - count:
            store(call.total, 0, float32(call.grad_scale * added_up(call.loss, call.rows)))
        size = next_chunk(call)
        start = fetch_add(call.state, size)
