"""The compiled squared error of features: against float64, in every memory format, decoded on the way."""

import pytest
import torch

from coursepack.data.encodings import parse_encoding
from coursepack.kernels import DenseRows, dispatch
from coursepack.kernels.regression import USED_TWICE, squared_error

SHAPES = [(5,), (3, 2, 2), (64, 8, 8), (20, 7, 5), (16, 1, 1), (1, 4, 4), (1100,), (2, 3)]


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formatted(features, order):
    return features.contiguous(memory_format=torch.channels_last) if order == "channels last" else features


def check(features, rows, values):
    """Loss and gradient against float64, with another weight for every sample."""
    weights = torch.arange(1.0, len(features) + 1)
    double = features.detach().double().requires_grad_()
    want = (double - values.double()).square().flatten(1).mean(1)
    (want * weights).sum().backward()
    moved = features.detach().requires_grad_()
    loss = squared_error(moved, rows)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=3e-7, atol=0)
    (loss * weights).sum().backward()
    torch.testing.assert_close(moved.grad.double(), double.grad, rtol=1e-6, atol=1e-12)
    return moved.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["channels first", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_value_and_gradient(shape, order, dtype):
    if order == "channels last" and len(shape) != 3:
        return
    features, stored = formatted(numbers(6, *shape, seed=1), order), numbers(6, *shape, seed=2).to(dtype)
    gradient = check(features, DenseRows(stored), stored.float())
    assert gradient.stride() == features.stride(), "convolutions read the gradient in the format of the map"


def test_other_encodings_and_plain_tensors():
    features, values = formatted(numbers(4, 3, 2, 2, seed=3), "channels last"), numbers(4, 3, 2, 2, seed=4)
    encoding = parse_encoding("int8")
    parts = encoding.encode(values.numpy(), None, None)
    rows = encoding.rows({name: torch.from_numpy(part) for name, part in parts.items()}, (3, 2, 2))
    check(features, rows, rows.decode())
    check(features, values, values)
    check(features, values.contiguous(memory_format=torch.channels_last), values)


def test_strided_features():
    check(numbers(8, 12, seed=5)[::2, ::3], numbers(4, 4, seed=6), numbers(4, 4, seed=6))
    check(
        numbers(3, 2, 2, 4, seed=7).permute(0, 3, 2, 1),
        numbers(3, 4, 2, 2, seed=8),
        numbers(3, 4, 2, 2, seed=8),
    )


def test_threads_do_not_change_bits():
    features, rows = numbers(96, 64, 8, 8, seed=9), numbers(96, 64, 8, 8, seed=10).half()
    features = formatted(features, "channels last")
    one = squared_error(features, DenseRows(rows))
    torch.set_num_threads(3)
    assert torch.equal(squared_error(features, DenseRows(rows)), one)


def test_the_definition_in_torch_agrees(monkeypatch):
    features, rows = formatted(numbers(4, 6, 4, 4, seed=11), "channels last"), numbers(4, 6, 4, 4, seed=12)
    compiled = squared_error(features, DenseRows(rows.half()))
    monkeypatch.setattr(dispatch, "NUMBA_IS_INSTALLED", False)
    torch.testing.assert_close(squared_error(features, DenseRows(rows.half())), compiled)


def test_an_empty_batch():
    assert squared_error(torch.empty(0, 3), torch.empty(0, 3)).shape == (0,)


def test_refusals():
    with pytest.raises(ValueError, match=r"rows have shape \(2, 4\), expected \(2, 3\)"):
        squared_error(torch.zeros(2, 3), torch.zeros(2, 4))
    features = torch.zeros(2, 3, requires_grad=True)
    loss = squared_error(features, torch.ones(2, 3)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=USED_TWICE):
        loss.backward()
