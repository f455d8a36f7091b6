"""Layout of the records that a compiled loss reads: one for the call, one for each teacher.

Every field is a 64-bit integer or float, so the records of a call are packed in one step. Integers come
first: `struct` keeps one code for neighbours of the same type, and reads a short list of codes faster. An
address of 0 means that the tensor is absent; strides count elements.
"""

from __future__ import annotations

import functools
import itertools
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

FLOAT32, FLOAT16, BFLOAT16, INT8, TOPK, PACKED, INT4 = range(7)
"""Storage kinds of a row."""
NONE, SHIFT, SMOOTH = range(3)
"""Adjustments of a wrong teacher, in the order of `spec.ADJUSTMENTS`."""
KL, REVERSE_KL, JENSEN_SHANNON, SQUARED_ERROR = range(4)
"""Divergences, in the order of `spec.DIVERGENCES`."""

_CALL = {
    "rows": "q",
    "classes": "q",
    "teachers": "q",
    "shares": "q",  # a thread takes this part of the rows that are left
    "state": "q",  # int64: the next row, the next thread, a bad row + 1, rows that are done
    "scratch": "q",  # float32, `scratch_stride` for each thread
    "scratch_stride": "q",
    "student": "q",
    "student_stride": "q",
    "student_kind": "q",
    "loss": "q",  # (N,) float32
    "total": "q",  # float32: the sum of `loss` times `grad_scale`
    "grad": "q",  # (N, C) as the student, contiguous
    "grad_weights": "q",  # (N, K) float32, contiguous
    "labels": "q",  # (N,) int64
    "second": "q",  # (N,) int64
    "lam": "q",  # (N,) float32
    "ignore_index": "q",
    "row_weight": "q",  # (N,) float32
    "temperature": "q",  # float32
    "temperature_stride": "q",
    "weights": "q",
    "weights_row": "q",
    "weights_column": "q",
    "weights_bytes": "q",  # 8: float64, always on the CPU; 4: float32
    "divergence": "q",
    "combine": "q",  # 0 mixture, 1 sum
    "fixed_temperature": "d",  # if there is no tensor
    "soft_weight": "d",
    "hard_weight": "d",
    "smoothing": "d",
    "grad_scale": "d",  # factor of `grad` and `total`
}
_TEACHER = {
    "kind": "q",
    "values": "q",
    "stride": "q",
    "affine": "q",  # (N, 2) float16; the scale (N, 2) of int4 and (N, 4) of packed rows
    "affine_stride": "q",
    "ids": "q",  # (N, k) uint16 or uint32
    "ids_stride": "q",
    "ids_bytes": "q",
    "kept": "q",  # k
    "tail": "q",  # (N, 4) float16
    "tail_stride": "q",
    "low_bits": "q",  # of packed rows
    "temperature": "q",
    "temperature_stride": "q",
    "adjustment": "q",
    "fixed_temperature": "d",  # 0 without a tensor: the temperature of the call
}


def _record(fields: dict[str, str]) -> np.dtype[Any]:
    return np.dtype([(name, {"q": np.int64, "d": np.float64}[code]) for name, code in fields.items()])


def _format(fields: dict[str, str]) -> str:
    """Return the format for `struct`, such as `15qd`."""
    return "".join(f"{len(list(same))}{code}" for code, same in itertools.groupby(fields.values()))


CALL, TEACHER = _record(_CALL), _record(_TEACHER)
CALL_BYTES = CALL.itemsize
FIELDS = len(_TEACHER)
"""Number of fields of a TEACHER record."""
VALUES, TEMPERATURE, TEMPERATURE_STRIDE, ADJUSTMENT, FIXED_TEMPERATURE = map(
    list(_TEACHER).index, ("values", "temperature", "temperature_stride", "adjustment", "fixed_temperature")
)
"""Places of some of them."""


@functools.cache
def packer(teachers: int) -> Callable[..., bytes]:
    """Return the function that packs the fields of a CALL record and of some TEACHER records, in order."""
    return struct.Struct(_format(_CALL) + _format(_TEACHER) * teachers).pack
