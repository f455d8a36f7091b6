"""Numbers that the compiled kernels convert, and their exponential and logarithm, beside NumPy and torch."""

from __future__ import annotations

import numba
import numpy as np
import torch

from coursepack.kernels.cpu import jit_convert, jit_math

HALVES = np.arange(65536, dtype=np.uint16)


def each(function, result):
    """A function of arrays from one of numbers: kernels have no way in from Python of their own."""

    @numba.njit
    def over(values):
        out = np.empty(len(values), result)
        for i in range(len(values)):
            out[i] = function(values[i])
        return out

    return over


def interesting():
    """float32 numbers at and around every place where rounding or range changes."""
    rng = np.random.default_rng(0)
    edges = HALVES.view(np.float16).astype(np.float32)
    edges = edges[np.isfinite(edges)]
    near = np.concatenate([np.nextafter(edges, np.float32(s * np.inf)) for s in (-1, 1)])
    middle = ((edges[:-1].astype(np.float64) + edges[1:]) / 2).astype(np.float32)
    any_bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    return np.concatenate(
        [edges, near, middle, any_bits, np.float32([65519.9, 65520, np.inf, -np.inf, np.nan])]
    )


def check_every_half():
    decoded = each(jit_convert.from_half, np.float32)(HALVES)
    np.testing.assert_array_equal(decoded, HALVES.view(np.float16).astype(np.float32))
    values = interesting()
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(each(jit_convert.to_half, np.uint16)(values).view(np.float16), expected)


def test_every_float16():
    check_every_half()


def test_every_bfloat16():
    decoded = each(jit_convert.from_bfloat16, np.float32)(HALVES)
    expected = torch.from_numpy(HALVES.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decoded, expected)
    values = interesting()
    rounded = each(jit_convert.to_bfloat16, np.uint16)(values).view(np.int16)
    got = torch.from_numpy(rounded).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(got, torch.from_numpy(values).bfloat16().float().numpy())


def test_exp2():
    values = -np.concatenate([np.linspace(0, 126, 500_001), [0, 1e-10, 125.99]]).astype(np.float32)
    got = each(jit_math.exp2, np.float32)(values)
    assert np.abs(got / np.exp2(values.astype(np.float64)) - 1).max() <= 2e-7
    special = np.float32([0, -126.6, -127, -1e4, -3e38, -np.inf, np.nan])
    np.testing.assert_array_equal(each(jit_math.exp2, np.float32)(special), [1, 0, 0, 0, 0, 0, np.nan])
    odd_nan = np.uint32([0x7FC00001, 0x7F800001, 0xFFC12345]).view(np.float32)
    assert np.isnan(each(jit_math.exp2, np.float32)(odd_nan)).all()


def test_log():
    rng = np.random.default_rng(0)
    values = np.concatenate([np.exp(rng.uniform(-87.3, 88, 500_000)), np.linspace(0.5, 2, 100_001)])
    values = values.astype(np.float32)
    got, want = each(jit_math.log, np.float32)(values), np.log(values.astype(np.float64))
    assert (np.abs(got - want) <= 2e-7 * np.abs(want)).all()
    assert got[values == 1].max(initial=0) == 0


def test_divergence_term():
    rng = np.random.default_rng(0)
    p = np.exp(rng.uniform(-30, 0, 100_000))
    q = p * np.exp(rng.normal(size=p.size) * 10 ** rng.uniform(-4, 1, p.size))

    @numba.njit
    def over(p, q, log_p, log_q):
        out = np.empty(len(p), np.float32)
        for i in range(len(p)):
            out[i] = jit_math.divergence_term(p[i], q[i], log_p[i], log_q[i])
        return out

    log_p, log_q = np.log(p).astype(np.float32), np.log(q).astype(np.float32)
    got = over(p.astype(np.float32), q.astype(np.float32), log_p, log_q)
    d = log_p.astype(np.float64) - log_q
    p, q = (x.astype(np.float32).astype(np.float64) for x in (p, q))
    want = np.where(np.abs(d) < 0.5, p * (d + np.expm1(-d)), p * d + (q - p))
    assert (np.abs(got - want) <= 3e-7 * (p * np.abs(d) + np.where(np.abs(d) < 0.5, 0, p + q))).all()
    zero, one, inf = np.float32([0]), np.float32([0.25]), np.float32([-np.inf])
    assert over(zero, one, np.float32([-87]), inf) == 0.25


def test_the_largest_of_a_row():
    @numba.njit
    def largest(values):
        high, low = jit_math.NO_SIGNED, jit_math.NO_UNSIGNED
        for value in values:
            high, low = jit_math.highest_signed(high, value), jit_math.lowest_unsigned(low, value)
        return jit_math.largest(high, low)

    for row in ([-3, -1, -2], [0.5, -9, 2], [-np.inf, -1e-45], [-np.inf, -np.inf], [np.inf, 3], [-0.0, -5]):
        assert largest(np.float32(row)) == np.float32(row).max()
