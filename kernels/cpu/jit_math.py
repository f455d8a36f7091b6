"""LLVM operations that numba does not offer, and vectorized exp and log. Imported at first use.

Everything here is inlined into loops over classes and so has no branch and no call: a polynomial costs a
tenth of libm's exponential. Fast-math flags are chosen per function: sums may be reordered, but NaN and
infinity keep their meaning, and rounding by adding a large constant must stay as written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir

from coursepack.kernels.cpu.jit_base import float32, intrinsic, njit, types

if TYPE_CHECKING:
    from collections.abc import Callable

EXACT = {"contract"}
"""Fast-math flags that allow only fused multiply-add."""
SUMS = {"reassoc", "nsz", "contract", "arcp"}
"""Fast-math flags that allow reordering of sums. NaN and infinity are preserved."""

I32, F32 = ir.IntType(32), ir.FloatType()


def _unary(result: Any, argument: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a decorator that turns a function of an IR builder and a value into an intrinsic."""

    def wrap(emit: Callable[[Any, Any], Any]) -> Any:
        def typed(typingctx: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return emit(builder, args[0])

            return result(argument), generate

        return intrinsic(typed)

    return wrap


@_unary(types.float32, types.float32)
def power_of_two(builder: Any, shifted: Any) -> Any:
    """Return 2^n from `1.5 * 2^23 + 127 + n`, for n of -127 (which gives 0) to 127."""
    return builder.bitcast(builder.shl(builder.bitcast(shifted, I32), ir.Constant(I32, 23)), F32)


def _exponent(builder: Any, bits: Any) -> Any:
    """`2^23 e` of a number `m 2^e` whose m is between sqrt(1/2) and sqrt(2)."""
    return builder.and_(builder.sub(bits, ir.Constant(I32, 0x3F3504F3)), ir.Constant(I32, -(1 << 23)))


@_unary(types.float32, types.uint8)
def low_code(builder: Any, byte: Any) -> Any:
    """Return the lower four bits of a byte as a number."""
    return builder.sitofp(builder.and_(builder.zext(byte, I32), ir.Constant(I32, 15)), F32)


@_unary(types.float32, types.uint8)
def high_code(builder: Any, byte: Any) -> Any:
    """Return the upper four bits of a byte as a number."""
    return builder.sitofp(builder.lshr(builder.zext(byte, I32), ir.Constant(I32, 4)), F32)


@_unary(types.float32, types.float32)
def exponent(builder: Any, value: Any) -> Any:
    """Return `2^23 e` of `value = m 2^e`, m between sqrt(1/2) and sqrt(2)."""
    return builder.sitofp(_exponent(builder, builder.bitcast(value, I32)), F32)


@_unary(types.float32, types.float32)
def mantissa(builder: Any, value: Any) -> Any:
    """Return m of `value = m 2^e`, m between sqrt(1/2) and sqrt(2)."""
    bits = builder.bitcast(value, I32)
    return builder.bitcast(builder.sub(bits, _exponent(builder, bits)), F32)


def _extreme(name: str, word: Any) -> Any:
    """Make an intrinsic `f(extreme, value)`: the new extreme of float32 bit patterns read as integers."""

    def typed(typingctx: Any, extreme: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function = builder.module.declare_intrinsic(name, [I32], ir.FunctionType(I32, [I32, I32]))
            return builder.call(function, [args[0], builder.bitcast(args[1], I32)])

        return word(word, types.float32), generate

    return intrinsic(typed)


# The largest float of a row in two instructions that vectorize; LLVM's own maximum handles NaN in eight.
# Read as signed integers, bit patterns of positive floats are ordered like the floats and exceed all negative
# ones; the largest negative float has the lowest pattern as an unsigned integer.
highest_signed = _extreme("llvm.smax", types.int32)
lowest_unsigned = _extreme("llvm.umin", types.uint32)
NO_SIGNED, NO_UNSIGNED = np.int32(-(2**31)), np.uint32(2**32 - 1)


@intrinsic
def largest(typingctx: Any, signed: Any, unsigned: Any) -> Any:
    """Combine the two extremes of a row to its largest float32; unspecified if the row holds a NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        negative = builder.icmp_signed("<", args[0], ir.Constant(I32, 0))
        return builder.bitcast(builder.select(negative, args[1], args[0]), F32)

    return types.float32(types.int32, types.uint32), generate


@intrinsic
def wide_vectors(typingctx: Any) -> Any:
    """Allow 512-bit vectors in this function if the CPU has them; LLVM often stops at 256."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Not inlined: the attribute belongs to the function that holds the loop.
        builder.function.attributes.add("noinline")
        # A plain set's `add`: llvmlite's own knows only attributes without a value.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


def _load(word: Any, result: Any) -> Any:
    """Make an intrinsic `load(start, index)` that reads one number of the row at an address."""

    def typed(typingctx: Any, start: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.gep(builder.inttoptr(args[0], word.as_pointer()), [args[1]])
            return builder.load(pointer, align=1)

        return result(types.int64, types.int64), generate

    return intrinsic(typed)


def _store(word: Any, value: Any) -> Any:
    """Make an intrinsic `store(start, index, number)` that writes one number of the row at an address."""

    def typed(typingctx: Any, start: Any, index: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.gep(builder.inttoptr(args[0], word.as_pointer()), [args[1]])
            builder.store(args[2], pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value), generate

    return intrinsic(typed)


load, store = _load(F32, types.float32), _store(F32, types.float32)
load_uint16, store_uint16 = _load(ir.IntType(16), types.uint16), _store(ir.IntType(16), types.uint16)
load_uint8, store_uint8 = _load(ir.IntType(8), types.uint8), _store(ir.IntType(8), types.uint8)
load_uint32 = _load(I32, types.uint32)
load_int64, store_int64 = _load(ir.IntType(64), types.int64), _store(ir.IntType(64), types.int64)
load_float64 = _load(ir.DoubleType(), types.float64)


@intrinsic
def prefetch(typingctx: Any, start: Any) -> Any:
    """Prefetch the cache line at an address, which need not be valid."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        signature_of = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], signature_of)
        # For reading, into the second-level cache, data.
        flags = [ir.Constant(I32, number) for number in (0, 2, 1)]
        builder.call(function, [builder.inttoptr(args[0], byte), *flags])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(forceinline=True)
def prefetch_lines(start: int, size: int) -> None:
    """Prefetch the cache lines of `size` bytes at an address."""
    for line in range(0, size, 64):
        prefetch(start + line)


@intrinsic
def pointer(typingctx: Any, start: Any) -> Any:
    """Convert an integer address to a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def address(typingctx: Any, pointer: Any) -> Any:
    """Convert a pointer to an integer address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(types.voidptr), generate


@intrinsic
def fetch_add(typingctx: Any, counter: Any, count: Any) -> Any:
    """Atomically add a count to the int64 at an address and return its previous value.

    What a thread has written before is seen by those that add to the same number later.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        where = builder.inttoptr(args[0], word.as_pointer())
        return builder.atomic_rmw("add", where, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


# Nearest integers by adding and taking away: in this range a float32 has no fraction. The lowest bits of the
# sum are the exponent bits of 2^n.
_ROUND = float32(1.5 * 2**23 + 127)
_LOWEST = float32(-127)
LOG2_E = float32(1.4426950408889634)
LN_2 = float32(0.6931471805599453 * 2**-23)
"""Logarithm of two over the unit of `exponent`."""
TINY = float32(1.1754943508222875e-38)


@njit(fastmath=EXACT, forceinline=True)
def exp2(t: float) -> float:
    """Return 2^t for t <= 0; relative error at most 2e-7; 0 below t = -126.5, exactly 1 at 0, NaN at NaN."""
    t = _LOWEST if t < _LOWEST else t
    shifted = t + _ROUND
    f = t - (shifted - _ROUND)
    # Minimax for the relative error on [-0.5, 0.5], the constant held at 1.
    p = float32(0.001326511995740875)
    p = p * f + float32(0.009671499633607627)
    p = p * f + float32(0.05550732299555005)
    p = p * f + float32(0.24022242366499116)
    p = p * f + float32(0.6931469788021559)
    p = p * f + float32(1)
    return p * power_of_two(shifted)


@njit(fastmath=EXACT, forceinline=True)
def log(value: float) -> float:
    """Natural logarithm of a normal float32, relative error at most 2e-7, exactly 0 at 1."""
    e, f = exponent(value), mantissa(value) - float32(1)
    # log(1 + f) = f - f²/2 + f³ p(f), minimax for the relative error on [sqrt(1/2) - 1, sqrt(2) - 1].
    p = float32(0.08700436431662345)
    p = p * f + float32(-0.14267486594720002)
    p = p * f + float32(0.14914767597174086)
    p = p * f + float32(-0.16577584733236805)
    p = p * f + float32(0.19963063832649827)
    p = p * f + float32(-0.2500133703516043)
    p = p * f + float32(0.3333391073656857)
    square = f * f
    return e * LN_2 + (f + square * (p * f - float32(0.5)))


@njit(fastmath=EXACT, forceinline=True)
def divergence_term(p: float, q: float, log_p: float, log_q: float) -> float:
    """`p log(p / q) + q - p`, never negative except by rounding, and q if p is 0, whatever `log_q`.

    With d = log p - log q it is `p (d + exp(-d) - 1)`, which near d = 0 is a series in d² without the
    cancellation of either form.
    """
    d = log_p - log_q
    # Minimax for (d + exp(-d) - 1) / d² on [-0.5, 0.5].
    series = float32(0.0013997796375501926)
    series = series * d + float32(-0.008395562518803067)
    series = series * d + float32(0.041665400964186826)
    series = series * d + float32(-0.16666277278692196)
    series = series * d + float32(0.5)
    near = p * d * d * series
    far = p * d + (q - p)
    term = near if abs(d) < float32(0.5) else far
    return q if p == float32(0) else term
