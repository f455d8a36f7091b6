"""Layout of the records that a compiled loss reads: one for the call, one for each teacher.

Every field is a 64-bit integer or float, so a record is packed in one step. An address of 0 means that the
tensor is absent; strides count elements.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

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
    "fixed_temperature": "d",  # if there is no tensor
    "weights": "q",
    "weights_row": "q",
    "weights_column": "q",
    "weights_bytes": "q",  # 8: float64, always on the CPU; 4: float32
    "divergence": "q",
    "combine": "q",  # 0 mixture, 1 sum
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
    "fixed_temperature": "d",
    "adjustment": "q",
}


def _record(fields: dict[str, str]) -> np.dtype[Any]:
    return np.dtype([(name, {"q": np.int64, "d": np.float64}[code]) for name, code in fields.items()])


CALL, TEACHER = _record(_CALL), _record(_TEACHER)
CALL_BYTES = CALL.itemsize
pack_call = struct.Struct("".join(_CALL.values())).pack
"""Packs the fields of a CALL record, in order, to bytes."""
pack_teacher = struct.Struct("".join(_TEACHER.values())).pack
"""Packs the fields of a TEACHER record, in order, to bytes."""
