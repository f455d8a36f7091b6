"""Encodings: the contract of all, and what each refuses."""

from __future__ import annotations

import contracts_encodings as contract
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coursepack.data.encodings import ENCODINGS, encoding_from_dict
from coursepack.errors import EncodingRange, UnknownName

NAMES = pytest.mark.parametrize("name", ENCODINGS)
FLOATS = st.floats(-65504, 65504, width=32)


def test_every_encoding_has_an_error_bound():
    assert contract.ERROR_BOUNDS.keys() == ENCODINGS.keys()


@NAMES
def test_description(name):
    contract.check_description(name)


@NAMES
@pytest.mark.parametrize("row_shape", contract.ROW_SHAPES, ids=str)
def test_components(name, row_shape):
    contract.check_components(name, row_shape)


@NAMES
@settings(max_examples=50, deadline=None)
@given(values=arrays(np.float32, (3, 7), elements=FLOATS))
def test_error_bound(name, values):
    contract.check_error_bound(name, values)


@NAMES
@pytest.mark.parametrize("row_shape", contract.ROW_SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1.0, 1e4])
def test_error_bound_at_every_magnitude(name, row_shape, scale):
    values = np.random.default_rng(0).uniform(-scale, scale, (50, *row_shape)).astype(np.float32)
    contract.check_error_bound(name, values)


def test_float32_is_exact_everywhere():
    edges = [0.0, -0.0, 1e-45, 3.4028235e38, -3.4028235e38, 1e-38, 65520.0]
    values = np.array([edges], dtype=np.float32)
    assert contract.roundtrip("float32", values).tobytes() == values.tobytes()


def test_float16_keeps_every_float16():
    codes = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = codes[np.isfinite(codes)].astype(np.float32)[None]
    assert contract.roundtrip("float16", values).tobytes() == values.tobytes()


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30, -3.4e38])
@pytest.mark.parametrize("row_shape", [(10,), (2, 3, 4)], ids=str)
def test_float16_out_of_range_names_the_sample_and_the_way_out(value, row_shape):
    values = np.zeros((5, *row_shape), dtype=np.float32)
    values[3].reshape(-1)[4] = value
    values[4].reshape(-1)[0] = 2 * value if abs(value) < 1e38 else value
    with pytest.raises(EncodingRange) as refusal:
        ENCODINGS["float16"]().encode(values, np.arange(100, 105))
    assert str(refusal.value) == (
        f"sample 103 has the value {value:g}, outside the range of float16 (+-65504). Use --encoding float32."
    )


def test_float16_holds_what_rounds_to_its_largest_value():
    values = np.array([[65519.996, -65519.996]], dtype=np.float32)
    assert contract.roundtrip("float16", values).tolist() == [[65504, -65504]]


@pytest.mark.parametrize("values", [{"name": "float61"}, {}])
def test_unknown_encoding_is_refused(values):
    with pytest.raises(UnknownName, match=r"unknown encoding .* Known: float32, float16"):
        encoding_from_dict(values)
