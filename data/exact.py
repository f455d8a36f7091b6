"""Logarithm and exponential that give the same bits on every platform.

The math libraries of different processors disagree in the last bit, which would change view parameters. These
functions use only additions, multiplications and divisions of float64, whose rounding IEEE 754 defines. The
error is at most 1e-14 relative to the result or, for results smaller than one, absolute.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LN2 = 0.6931471805599453
_TERMS = 24


def log(x: Floats) -> Floats:
    """Return the natural logarithm of positive numbers."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = np.where(small, mantissa * 2, mantissa)
    # log m = 2 artanh((m - 1) / (m + 1)), |.| <= 0.172: each term of the series adds 1.5 digits.
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    total = np.zeros_like(ratio)
    for k in range(2 * (_TERMS // 2) + 1, 0, -2):
        total = total * square + 1.0 / k
    result: Floats = (exponent - small) * LN2 + 2 * ratio * total
    return result


def exp(x: Floats) -> Floats:
    """Return the exponential of numbers from -700 to 700.

    For |x| > 30 the relative error grows as 2e-16 * |x|.
    """
    integer = np.rint(x / LN2)
    fraction = x - integer * LN2
    total = np.ones_like(fraction)
    for k in range(_TERMS, 0, -1):
        total = 1 + total * fraction / k
    scaled: Floats = np.ldexp(total, integer.astype(np.int64))
    return scaled
