"""The compiled squared error of features: against float64, in every memory format, decoded on the way."""

import pytest
import torch

from coursepack.data.encodings import parse_encoding
from coursepack.kernels import DenseRows, dispatch
from coursepack.kernels.regression import linear_squared_error, squared_error

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
    with pytest.raises(ValueError, match=r"rows have shape \(2, 4\), expected \(2, 5\)"):
        linear_squared_error(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5), torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(5,), (5, 4, 4), (3, 1, 1), (7, 3, 2)])
@pytest.mark.parametrize("order", ["channels first", "channels last"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_linear_map_and_its_error(shape, order, compiled, monkeypatch):
    monkeypatch.setattr(dispatch, "NUMBA_IS_INSTALLED", compiled)
    features = numbers(6, *shape, seed=13)
    features = formatted(features, order) if len(shape) == 3 else features
    weight, bias = numbers(8, shape[0], *[1] * (len(shape) - 1), seed=14), numbers(8, seed=15)
    rows, factors = numbers(6, 8, *shape[1:], seed=16).half(), torch.arange(1.0, 7)
    tensors = [each.clone().requires_grad_() for each in (features, weight, bias)]
    double = [each.double().detach().requires_grad_() for each in (features, weight, bias)]
    mapped = torch.einsum("nc...,oc->no...", double[0], double[1].flatten(1))
    mapped = mapped + double[2].reshape(-1, *[1] * (len(shape) - 1))
    want = (mapped - rows.double()).square().flatten(1).mean(1)
    loss = linear_squared_error(*tensors, DenseRows(rows))
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    (want * factors).sum().backward()
    for _ in range(2):
        (loss * factors).sum().backward(retain_graph=True)
    for tensor, exact in zip(tensors, double, strict=True):
        torch.testing.assert_close(tensor.grad.double(), 2 * exact.grad, rtol=1e-5, atol=1e-6)


def test_a_frozen_student_gets_no_gradient():
    weight, bias = numbers(4, 3, seed=17).requires_grad_(), torch.zeros(4, requires_grad=True)
    linear_squared_error(numbers(5, 3, seed=18), weight, bias, numbers(5, 4, seed=19)).sum().backward()
    assert weight.grad.any()
    assert bias.grad.any()
