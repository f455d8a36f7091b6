"""Conversion of stored rows to float32 and back, compiled. Imported at first use: numba is slow to import.

float16 uses the CPU's conversion instruction if the target CPU has one, and integer arithmetic otherwise:
LLVM would call a library function that is missing, and the process would abort.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from coursepack.kernels.cpu.jit_base import float32, intrinsic, njit, types
from coursepack.kernels.cpu.jit_math import (
    NO_SIGNED,
    NO_UNSIGNED,
    SUMS,
    highest_signed,
    largest,
    load,
    load_uint8,
    load_uint16,
    lowest_unsigned,
    store,
    store_uint16,
    wide_vectors,
)

I16, I32, F32, F16 = ir.IntType(16), ir.IntType(32), ir.FloatType(), ir.HalfType()


def _converts_half(context: Any) -> bool:
    """True if the target CPU has instructions to convert float16."""
    triple, _, features = context.codegen().magic_tuple()
    return not triple.startswith(("x86", "i386", "i686")) or "+f16c" in features.split(",")


@intrinsic
def from_half(typingctx: Any, code: Any) -> Any:
    """Convert the 16 bits of a float16 to float32."""

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
    """Round a float32 to float16, ties to even, and return its 16 bits."""

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
    """Convert the 16 bits of a bfloat16 to float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16)), F32)

    return types.float32(types.uint16), generate


@intrinsic
def to_bfloat16(typingctx: Any, value: Any) -> Any:
    """Round a float32 to bfloat16, ties to even, and return its 16 bits."""

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


# Rows are passed as addresses, because an array takes seven words per call. Loops process whole lots of `LOT`
# classes, and then the last `LOT` classes again if C is not a multiple: a scalar remainder loop would cost as
# much as several lots.
LOT = 64


@njit(forceinline=True)
def lots(classes: int) -> int:
    """Round down to a multiple of `LOT`."""
    return (classes >> 6) << 6


@njit
def fill(out: int, start: int, stop: int, value: float) -> None:
    """Set `out[start:stop]` to a value."""
    wide_vectors()
    for c in range(start, stop):
        store(out, c, value)


def _reader(convert: Any) -> Any:
    """Make a function `read(row, classes, scale, minimum, out) -> top` that decodes a row into float32.

    `out` has room for a multiple of `LOT` values and is padded with -inf. The function returns the largest
    value; if the row holds a NaN, the returned value is unspecified.
    """

    @njit(fastmath=SUMS)
    def read(row: int, classes: int, scale: float, minimum: float, out: int) -> float:
        wide_vectors()
        high, low = NO_SIGNED, NO_UNSIGNED
        whole = lots(classes)
        for c in range(whole):
            value = convert(row, c, scale, minimum)
            store(out, c, value)
            high, low = highest_signed(high, value), lowest_unsigned(low, value)
        if classes > whole:
            for c in range(whole, whole + LOT):
                store(out, c, float32(-np.inf))
            first = classes - LOT if whole else 0
            for c in range(first, first + LOT if whole else classes):
                value = convert(row, c, scale, minimum)
                store(out, c, value)
                high, low = highest_signed(high, value), lowest_unsigned(low, value)
        return largest(high, low)

    return read


@njit(forceinline=True)
def _as_is(row: int, c: int, scale: float, minimum: float) -> float:
    return load(row, c)


@njit(forceinline=True)
def _half(row: int, c: int, scale: float, minimum: float) -> float:
    return from_half(load_uint16(row, c))


@njit(forceinline=True)
def _bfloat16(row: int, c: int, scale: float, minimum: float) -> float:
    return from_bfloat16(load_uint16(row, c))


@njit(forceinline=True)
def _affine(row: int, c: int, scale: float, minimum: float) -> float:
    return minimum + scale * float32(load_uint8(row, c))


read_float32, read_half, read_bfloat16, read_int8 = map(_reader, (_as_is, _half, _bfloat16, _affine))


def _writer(convert: Any) -> Any:
    """Make a function `write(values, row, classes)` that rounds a float32 row to another dtype."""

    @njit
    def write(values: int, row: int, classes: int) -> None:
        wide_vectors()
        whole = lots(classes)
        for c in range(whole):
            convert(row, c, load(values, c))
        if classes > whole:
            first = classes - LOT if whole else 0
            for c in range(first, first + LOT if whole else classes):
                convert(row, c, load(values, c))

    return write


@njit(forceinline=True)
def _same(row: int, c: int, value: float) -> None:
    store(row, c, value)


@njit(forceinline=True)
def _to_half(row: int, c: int, value: float) -> None:
    store_uint16(row, c, to_half(value))


@njit(forceinline=True)
def _to_bfloat16(row: int, c: int, value: float) -> None:
    store_uint16(row, c, to_bfloat16(value))


write_float32, write_half, write_bfloat16 = map(_writer, (_same, _to_half, _to_bfloat16))
