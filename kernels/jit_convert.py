"""Rows of stored numbers to float32 and back, compiled. Loaded at first use: importing numba is slow.

float16 is converted by the CPU's own instruction where the CPU that is compiled for has one, otherwise by
integer arithmetic: LLVM would call a library function that is not there, and the process would abort.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from coursepack.kernels.jit_base import float32, intrinsic, njit, types
from coursepack.kernels.jit_math import (
    NO_SIGNED,
    NO_UNSIGNED,
    SUMS,
    highest_signed,
    largest,
    lowest_unsigned,
    wide_vectors,
)

I16, I32, F32, F16 = ir.IntType(16), ir.IntType(32), ir.FloatType(), ir.HalfType()


def _converts_half(context: Any) -> bool:
    """Whether the CPU that is compiled for converts float16."""
    triple, _, features = context.codegen().magic_tuple()
    return not triple.startswith(("x86", "i386", "i686")) or "+f16c" in features.split(",")


@intrinsic
def from_half(typingctx: Any, code: Any) -> Any:
    """The float32 of a float16's 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _converts_half(context):
            return builder.fpext(builder.bitcast(args[0], F16), F32)
        code = builder.zext(args[0], I32)
        sign = builder.shl(builder.and_(code, ir.Constant(I32, 0x8000)), ir.Constant(I32, 16))
        moved = builder.shl(builder.and_(code, ir.Constant(I32, 0x7FFF)), ir.Constant(I32, 13))
        # Times 2^112, the difference of the exponents' offsets: right for subnormal numbers too.
        scaled = builder.fmul(builder.bitcast(moved, F32), ir.Constant(F32, 2.0**112))
        bits = builder.or_(builder.bitcast(scaled, I32), sign)
        special = builder.icmp_unsigned(">=", moved, ir.Constant(I32, 0x7C00 << 13))
        return builder.bitcast(
            builder.select(special, builder.or_(bits, ir.Constant(I32, 0x7F800000)), bits), F32
        )

    return types.float32(types.uint16), generate


@intrinsic
def to_half(typingctx: Any, value: Any) -> Any:
    """The 16 bits of a float32 rounded to float16, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _converts_half(context):
            return builder.bitcast(builder.fptrunc(args[0], F16), I16)

        def word(number: int) -> Any:
            return ir.Constant(I32, number)

        bits = builder.bitcast(args[0], I32)
        sign = builder.and_(builder.lshr(bits, word(16)), word(0x8000))
        magnitude = builder.and_(bits, word(0x7FFFFFFF))
        # Normal: rebase the exponent and round the 13 bits that go away.
        odd = builder.and_(builder.lshr(magnitude, word(13)), word(1))
        normal = builder.lshr(builder.add(builder.add(magnitude, word(-(112 << 23) + 0xFFF)), odd), word(13))
        # Subnormal: adding 0.5 makes the sum's last bit that of a float16.
        sum_bits = builder.bitcast(builder.fadd(builder.bitcast(magnitude, F32), ir.Constant(F32, 0.5)), I32)
        small = builder.sub(sum_bits, word(0x3F000000))
        result = builder.select(builder.icmp_unsigned("<", magnitude, word(113 << 23)), small, normal)
        result = builder.select(
            builder.icmp_unsigned(">=", magnitude, word(0x477FF000)), word(0x7C00), result
        )
        result = builder.select(builder.icmp_unsigned(">", magnitude, word(0x7F800000)), word(0x7E00), result)
        return builder.trunc(builder.or_(result, sign), I16)

    return types.uint16(types.float32), generate


@intrinsic
def from_bfloat16(typingctx: Any, code: Any) -> Any:
    """The float32 of a bfloat16's 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16)), F32)

    return types.float32(types.uint16), generate


@intrinsic
def to_bfloat16(typingctx: Any, value: Any) -> Any:
    """The 16 bits of a float32 rounded to bfloat16, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd)
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        result = builder.lshr(
            builder.select(nan, ir.Constant(I32, 0x7FC00000), rounded), ir.Constant(I32, 16)
        )
        return builder.trunc(result, I16)

    return types.uint16(types.float32), generate


# The loops below go over whole lots of `LOT` classes, and once more over the last lot where it is not whole:
# what is left over by vectors would be done one by one, at the cost of several lots.
LOT = 64


@njit(inline="always")
def lots(classes: int) -> int:
    """Classes in whole lots."""
    return (classes >> 6) << 6


@njit(inline="always")
def places(start: int, count: int) -> range:
    """Indices into a row. Unsigned: an index that may be negative is checked every time, one by one."""
    return range(np.uint64(start), np.uint64(start + count))


@njit
def fill(out: np.ndarray, start: int, value: float) -> None:
    """Set a row of float32 from a place on."""
    wide_vectors()
    for c in places(start, out.shape[0] - start):
        out[c] = value


def _reader(convert: Any) -> Any:
    """A function `read(row, scale, minimum, out) -> top` that decodes a row of numbers into float32.

    `out` is longer than the row by less than a lot, and is filled up with -inf. The largest value is
    returned; with NaN in the row it may be any.
    """

    @njit(fastmath=SUMS)
    def span(
        row: np.ndarray,
        scale: float,
        minimum: float,
        out: np.ndarray,
        start: int,
        count: int,
        high: int,
        low: int,
    ) -> tuple[int, int]:
        wide_vectors()
        for c in places(start, count):
            value = convert(row[c], scale, minimum)
            out[c] = value
            high, low = highest_signed(high, value), lowest_unsigned(low, value)
        return high, low

    @njit
    def read(row: np.ndarray, scale: float, minimum: float, out: np.ndarray) -> float:
        classes = row.shape[0]
        whole = lots(classes)
        high, low = span(row, scale, minimum, out, 0, whole, NO_SIGNED, NO_UNSIGNED)
        if classes > whole:
            fill(out, whole, float32(-np.inf))
            if whole:
                high, low = span(row, scale, minimum, out, classes - LOT, LOT, high, low)
            else:
                high, low = span(row, scale, minimum, out, 0, classes, high, low)
        return largest(high, low)

    return read


@njit(inline="always")
def _as_is(value: float, scale: float, minimum: float) -> float:
    return value


@njit(inline="always")
def _half(code: int, scale: float, minimum: float) -> float:
    return from_half(code)


@njit(inline="always")
def _bfloat16(code: int, scale: float, minimum: float) -> float:
    return from_bfloat16(code)


@njit(inline="always")
def _affine(q: int, scale: float, minimum: float) -> float:
    return minimum + scale * float32(q)


read_float32, read_half, read_bfloat16, read_int8 = map(_reader, (_as_is, _half, _bfloat16, _affine))


def _writer(convert: Any) -> Any:
    """A function `write(values, row)` that rounds a row of float32 to what the row holds."""

    @njit
    def span(values: np.ndarray, row: np.ndarray, start: int, count: int) -> None:
        wide_vectors()
        for c in places(start, count):
            row[c] = convert(values[c])

    @njit
    def write(values: np.ndarray, row: np.ndarray) -> None:
        classes = row.shape[0]
        whole = lots(classes)
        span(values, row, 0, whole)
        if whole and classes > whole:
            span(values, row, classes - LOT, LOT)
        elif classes > whole:
            span(values, row, 0, classes)

    return write


@njit(inline="always")
def _same(value: float) -> float:
    return value


write_float32, write_half, write_bfloat16 = map(_writer, (_same, to_half, to_bfloat16))
