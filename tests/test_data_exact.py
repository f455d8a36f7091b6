"""Logarithm and exponential from additions, multiplications and divisions alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coursepack.data import exact

POSITIVE = st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_log_is_that_of_the_library(values):
    found = exact.log(np.array(values))
    expected = np.array([math.log(value) for value in values])
    assert (np.abs(found - expected) <= 1e-14 * np.maximum(1, np.abs(expected))).all()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-700, 700), min_size=1, max_size=20))
def test_exp_is_that_of_the_library(values):
    found = exact.exp(np.array(values))
    # The whole part times log 2 is rounded: the relative error grows with the argument.
    expected = np.array([math.exp(value) for value in values])
    assert (np.abs(found - expected) <= 2e-16 * expected * (5 + np.abs(values))).all()


def test_within_the_stated_bound_where_boxes_and_shares_need_it():
    ratios = np.exp(np.linspace(-5, 5, 20_001))
    assert np.abs(exact.log(ratios) - np.log(ratios)).max() <= 1e-14
    powers = np.linspace(-30, 30, 20_001)
    assert np.abs(exact.exp(powers) / np.exp(powers) - 1).max() <= 1e-14
    words = (np.arange(0, 2**32, 2**16 - 1) + 0.5) / 2.0**32
    assert np.abs(exact.log(words) / np.log(words) - 1).max() <= 1e-14


def test_fixed_points_are_exact():
    assert exact.log(np.array([1.0]))[0] == 0.0
    assert exact.exp(np.array([0.0]))[0] == 1.0
    powers = np.arange(-1000, 1001)
    assert np.array_equal(exact.log(np.ldexp(1.0, powers)), powers * exact.LN2)
    assert math.log(2) == exact.LN2


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-300, 1e300), st.floats(1e-300, 1e300))
def test_log_never_falls(first, second):
    low, high = sorted((first, second))
    assert exact.log(np.array([low]))[0] <= exact.log(np.array([high]))[0] + 1e-13


def test_shape_is_kept_and_numbers_do_not_depend_on_their_neighbours():
    values = np.random.default_rng(0).uniform(1e-9, 9, (31, 7))
    for function in (exact.log, exact.exp):
        whole = function(values)
        assert whole.shape == (31, 7)
        single = [function(np.array([value]))[0] for value in values.reshape(-1)]
        assert np.array_equal(whole.reshape(-1), single)


@pytest.mark.parametrize(
    ("function", "value", "bits"),
    [
        (exact.log, 0.1, "-0x1.26bb1bbb55515p+1"),
        (exact.log, 3.0, "0x1.193ea7aad030ap+0"),
        (exact.log, 1e-9, "-0x1.4b927f32bffb8p+4"),
        (exact.exp, 1.0, "0x1.5bf0a8b14576ap+1"),
        (exact.exp, -0.3, "0x1.7b4c869c37c05p-1"),
        (exact.exp, -41.7, "0x1.ca2191e6478fdp-61"),
    ],
)
def test_bits_are_the_same_everywhere(function, value, bits):
    assert float(function(np.array([value]))[0]).hex() == bits
