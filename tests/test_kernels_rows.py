"""Encoded rows: what every kind offers, and what dense rows hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from coursepack.kernels import DenseRows, Rows, decode

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_rows_decode_exactly(dtype):
    values = torch.linspace(-300, 300, 24).reshape(4, 6).to(dtype)
    values[0, 0], values[1, 1] = float("-inf"), float("nan")
    rows = DenseRows(values)
    assert isinstance(rows, Rows)
    assert rows.shape == (4, 6)
    assert rows.device == torch.device("cpu")
    decoded = rows.decode()
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, values.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(decode(rows), decoded, rtol=0, atol=0, equal_nan=True)


def test_every_float16_code_decodes_to_its_value():
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = codes.view(torch.float16).reshape(256, 256)
    decoded = DenseRows(values).decode().numpy()
    expected = values.numpy().astype("float32")
    assert ((decoded == expected) | (decoded != decoded) & (expected != expected)).all()


def test_float32_rows_are_not_copied():
    values = torch.ones(2, 3)
    assert DenseRows(values).decode().data_ptr() == values.data_ptr()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_decode_of_a_tensor_is_float32(dtype):
    values = torch.tensor([[0.5, -3.0]], dtype=dtype)
    assert torch.equal(decode(values), torch.tensor([[0.5, -3.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool], ids=str)
def test_other_dtypes_are_refused(dtype):
    text = rf"dense rows have dtype {dtype}, expected one of float32, float16, bfloat16"
    with pytest.raises(TypeError, match=text):
        DenseRows(torch.zeros(2, 3, dtype=dtype))


def test_rows_move_and_do_not_change():
    rows = DenseRows(torch.ones(2, 3, dtype=torch.float16))
    moved = rows.to("meta", non_blocking=True)
    assert (moved.device.type, moved.shape, moved.values.dtype) == ("meta", (2, 3), torch.float16)
    assert rows.device.type == "cpu"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.values = torch.zeros(2, 3)


def test_rows_of_features_keep_their_shape():
    assert DenseRows(torch.zeros(2, 3, 4, 5)).decode().shape == (2, 3, 4, 5)
