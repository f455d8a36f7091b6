"""Logarithm and exponential that give the same bits on every platform.

Libraries' own differ in the last bit between processors, and a drawn parameter must not. These use only
additions, multiplications and divisions of float64, which IEEE 754 rounds in one way, and are within 1e-14 of
the true value, relative to it or to one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LN2 = 0.6931471805599453
_TERMS = 24


def log(x: Floats) -> Floats:
    """Natural logarithm of positive numbers."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = np.where(small, mantissa * 2, mantissa)
    # log m = 2 artanh((m - 1) / (m + 1)), with |.| <= 0.172: the series gains 1.5 digits a term.
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    total = np.zeros_like(ratio)
    for k in range(2 * (_TERMS // 2) + 1, 0, -2):
        total = total * square + 1.0 / k
    result: Floats = (exponent - small) * LN2 + 2 * ratio * total
    return result


def exp(x: Floats) -> Floats:
    """Exponential of numbers from -700 to 700; beyond 30 its relative error grows as 2e-16 of the number."""
    whole = np.rint(x / LN2)
    rest = x - whole * LN2
    total = np.ones_like(rest)
    for k in range(_TERMS, 0, -1):
        total = 1 + total * rest / k
    scaled: Floats = np.ldexp(total, whole.astype(np.int64))
    return scaled
