"""Reading of packed top-k rows, compiled. Imported at first use: numba is slow to import.

A code of six bits has 64 values, so a row needs one lot of exponentials however many classes it keeps. Rows
are addresses, as in `jit_convert`. Nothing is written outside a row of C values whatever the bits say: a row
whose class ids are not ascending and below C gives NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir

from coursepack.kernels.cpu.jit_base import float32, float64, int64, intrinsic, jit, njit, types
from coursepack.kernels.cpu.jit_convert import LOT, fill, from_half
from coursepack.kernels.cpu.jit_math import exp2, load, load_int64, load_uint8, load_uint16, store
from coursepack.kernels.cpu.jit_softmax import exponentials

CODE_BITS = 6
CODES = 64
SQUARES = 63.0**2
WORD = 8
"""Bytes that are read together."""
WHOLE = 56
"""Bits of them that are there wherever in a byte the first is."""


@intrinsic
def trailing_zeros(typingctx: Any, word: Any) -> Any:
    """Return the position of the lowest bit of an int64 that is set; the word must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def set_bits(typingctx: Any, word: Any) -> Any:
    """Return the number of bits of an int64 that are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), generate


@njit(forceinline=True)
def field(start: int, size: int, position: int, width: int) -> int:
    """Return `width` bits, `WHOLE` at most, at a bit position of a row of `size` bytes."""
    byte = position >> 3
    if size >= WORD:
        byte = byte if byte < size - WORD else size - WORD
        word = load_int64(start + byte, 0)
    else:
        word = int64(0)
        for i in range(size - byte):
            word |= int64(load_uint8(start, byte + i)) << (8 * i)
    return (word >> (position - 8 * byte)) & ((int64(1) << width) - 1)


@njit(forceinline=True)
def place(
    start: int, size: int, kept: int, classes: int, low: int, table: int, out: int
) -> tuple[bool, float]:
    """Write `table[code]` to `out` at every kept class; return whether the ids are sound, and the sum.

    Without `out`, an address of 0, only the ids are checked.
    """
    high = kept + ((classes - 1) >> low)
    lows, codes = high, high + kept * low
    total, found, previous = 0.0, 0, -1
    few_lows, few_codes = WHOLE // low if low else WHOLE, WHOLE // CODE_BITS
    some_lows, some_codes, mask = int64(0), int64(0), (1 << low) - 1
    lows_left, codes_left = 0, 0
    for first in range(0, high, WHOLE):
        word = field(start, size, first, WHOLE if high - first > WHOLE else high - first)
        if found + set_bits(word) > kept:
            return False, total
        while word != 0:
            if lows_left == 0:
                some_lows, lows_left = field(start, size, lows, WHOLE), few_lows
                lows += low * few_lows
            index = (first + trailing_zeros(word) - found) << low | some_lows & mask
            if index <= previous or index >= classes:
                return False, total
            if out:
                if codes_left == 0:
                    some_codes, codes_left = field(start, size, codes, WHOLE), few_codes
                    codes += CODE_BITS * few_codes
                value = load(table, some_codes & (CODES - 1))
                store(out, index, value)
                some_codes, codes_left = some_codes >> CODE_BITS, codes_left - 1
                total += float64(value)
            previous = index
            found += 1
            some_lows, lows_left = some_lows >> low, lows_left - 1
            word &= word - 1
    return found == kept, total


@njit
def write_table(top: float, span: float, table: int) -> None:
    """Write the logits of all codes, for a row's top logit and range."""
    step = span * float32(1 / SQUARES)
    for code in range(CODES):
        store(table, code, top - float32(code * code) * step)


@njit
def excess(dropped: int, first: float, second: float, temperature: float) -> float:
    """Return how far the logit of dropped classes is above the top one, never positive.

    `first` and `second` are their log masses at T = 1 and 4.
    """
    if dropped == 0:
        return float32(0)
    inverse, limit = float32(1 / temperature), float32(math.log(dropped))
    if inverse <= float32(0.25):
        mass = limit + (second - limit) * (inverse / float32(0.25))
    else:
        mass = second + (first - second) * ((inverse - float32(0.25)) / float32(0.75))
    result = (mass - limit) / inverse
    return float32(0) if result > 0 else result


@njit
def scale_at(teacher: Any, n: int, column: int) -> float:
    """Return a number of the scale of a row."""
    return from_half(load_uint16(teacher.affine, n * teacher.affine_stride + column))


@njit
def excess_at(teacher: Any, n: int, dropped: int, temperature: float) -> float:
    """Return how far the logit of the dropped classes of a row is above its top one."""
    return excess(dropped, scale_at(teacher, n, 2), scale_at(teacher, n, 3), temperature)


@njit
def read_packed(
    teacher: Any, n: int, classes: int, length: int, temperature: float, table: int, out: int
) -> float:
    """Decode a row, padded with -inf, and return its largest value. `table` is a row of scratch."""
    size, kept, top = teacher.stride, teacher.kept, scale_at(teacher, n, 0)
    write_table(top, scale_at(teacher, n, 1), table)
    fill(out, 0, classes, float32(top + excess_at(teacher, n, classes - kept, temperature)))
    fill(out, classes, length, float32(-np.inf))
    sound, _ = place(teacher.values + n * size, size, kept, classes, teacher.low_bits, table, out)
    return top if sound else float32(np.nan)


@njit
def packed_exponentials(
    teacher: Any, n: int, classes: int, length: int, temperature: float, factor: float, spare: int, out: int
) -> float:
    """Compute `exponentials` of a row, evaluating only those of the codes."""
    size, kept = teacher.stride, teacher.kept
    dropped = classes - kept
    write_table(float32(0), scale_at(teacher, n, 1), out)
    exponentials(out, float32(0), factor, spare, LOT, out, 0)
    rest = exp2(float32(excess_at(teacher, n, dropped, temperature) * factor))
    fill(out, 0, classes, rest)
    fill(out, classes, length, float32(0))
    sound, total = place(teacher.values + n * size, size, kept, classes, teacher.low_bits, spare, out)
    return total + dropped * float64(rest) if sound else np.nan


@njit
def is_sound(start: int, size: int, kept: int, classes: int, low: int) -> bool:
    """Return whether a row has `kept` ascending class ids below C."""
    return place(start, size, kept, classes, low, 0, 0)[0]


@jit
def packed_bad_row(entries: np.ndarray, kept: int, classes: int, low: int) -> int:
    """Return the first row of `entries (N, B)` uint8, contiguous, whose class ids are not sound, or -1."""
    size, start = entries.shape[1], int64(entries.ctypes.data)
    for n in range(entries.shape[0]):
        if not is_sound(start + n * size, size, kept, classes, low):
            return n
    return -1


@jit
def packed_decode(
    entries: int,
    scale: int,
    inverse: int,
    step: int,
    out: int,
    rows: int,
    classes: int,
    size: int,
    kept: int,
    low: int,
) -> bool:
    """Decode packed top-k rows on the CPU. Addresses are of contiguous memory.

    Args:
        entries: address of `(N, B)` uint8.
        scale: address of `(N, 4)` float16: top logit, range, log masses of dropped classes at T = 1 and 4.
        inverse: address of 1/T, float32.
        step: number of values from one row's temperature to the next; 0 if all have the first.
        out: address of `(N, C)` float32.
        rows: N.
        classes: C.
        size: B.
        kept: k.
        low: `packed.low_bits`.

    Returns:
        False if a row has no sound class ids.
    """
    table = np.empty(CODES, np.float32)
    values = int64(table.ctypes.data)
    all_sound = True
    for n in range(rows):
        row, own = out + 4 * n * classes, 4 * n
        top = from_half(load_uint16(scale, own))
        write_table(top, from_half(load_uint16(scale, own + 1)), values)
        first, second = from_half(load_uint16(scale, own + 2)), from_half(load_uint16(scale, own + 3))
        temperature = float64(1) / load(inverse, n * step)
        fill(row, 0, classes, float32(top + excess(classes - kept, first, second, temperature)))
        sound, _ = place(entries + n * size, size, kept, classes, low, values, row)
        all_sound = all_sound and sound
    return all_sound
