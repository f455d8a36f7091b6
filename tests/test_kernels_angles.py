"""The compiled angle loss: against its definition in float64, at all sizes, and where points are the same."""

import numpy as np
import pytest
import torch
from reference import methods as ref

from coursepack.kernels import dispatch
from coursepack.kernels.angles import angle_loss, chunked_angle_loss


def points(rows, width, seed, dtype=torch.float32, *, probs=True):
    logits = np.random.default_rng(seed).normal(0, 2, (rows, width))
    values = torch.from_numpy(logits)
    return (values.softmax(1) if probs else values).to(dtype)


def both(student, teacher):
    """Value and gradient of the compiled loss, and of its definition in float64."""
    found = []
    for loss, dtype in ((angle_loss, student.dtype), (chunked_angle_loss, torch.float64)):
        moved = student.detach().to(dtype).requires_grad_()
        value = loss(moved, teacher.to(dtype))
        value.backward()
        found.append((value.detach(), moved.grad))
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 31, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient(rows, dtype):
    (value, gradient), (want, slope) = both(points(rows, 7, 1, dtype), points(rows, 5, 2, dtype))
    assert value.dtype == gradient.dtype == dtype
    rounding = 1e-7 if dtype == torch.float32 else 1e-12
    assert value.item() == pytest.approx(want.item(), rel=rounding, abs=1e-30)
    assert (gradient - slope).abs().max() <= rounding * slope.abs().max() + 1e-30


@pytest.mark.parametrize("seed", range(3))
def test_both_paths_against_loops(seed):
    student, teacher = (points(9, 4, seed + s, torch.float64, probs=False) for s in (0, 10))
    want = ref.angle_loss(student.numpy(), teacher.numpy())
    slope = ref.numeric_gradient(lambda x: ref.angle_loss(x, teacher.numpy()), student.numpy())
    for loss in (angle_loss, chunked_angle_loss):
        moved = student.clone().requires_grad_()
        value = loss(moved, teacher)
        (3 * value).backward()
        assert value.item() == pytest.approx(want, rel=1e-9)
        np.testing.assert_allclose(moved.grad.numpy(), 3 * slope, rtol=1e-5, atol=1e-8)


def test_differences_of_angles_above_one_are_linear():
    """Corners of a square, whose right angles become flat ones."""
    student = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.float64)
    (value, gradient), (want, slope) = both(student[[0, 2, 1, 3]], teacher)
    assert value.item() == pytest.approx(want.item(), rel=1e-12)
    torch.testing.assert_close(gradient, slope)


def test_points_close_to_each_other_keep_their_angles():
    student, teacher = points(20, 6, 3), points(20, 6, 4)
    student[10:] = student[:10] * (1 + 3e-6 * points(10, 6, 5))
    (value, gradient), (want, slope) = both(student, teacher)
    assert value.item() == pytest.approx(want.item(), rel=1e-6)
    assert (gradient - slope).abs().max() <= 1e-6 * slope.abs().max()


def test_equal_points_have_no_angle_and_no_gradient_from_it():
    student, teacher = points(8, 5, 6, torch.float64), points(8, 5, 7, torch.float64)
    student[3] = student[2]
    (value, gradient), (want, _) = both(student, teacher)
    assert value.item() == pytest.approx(want.item(), rel=1e-12)
    assert gradient.abs().max() < 1
    (value, gradient), _ = both(torch.ones(5, 3), points(5, 3, 8))
    assert value > 0
    assert not gradient.any()


def test_a_student_like_its_teacher_has_no_loss():
    student = points(40, 6, 9)
    (value, gradient), _ = both(student, student)
    assert value == 0
    assert not gradient.any()


def test_nan_stays_nan():
    student = points(20, 6, 10)
    student[4, 2] = float("nan")
    assert both(student, points(20, 6, 11))[0][0].isnan()


def test_gradient_of_any_loss_around_it():
    student, teacher = points(12, 5, 12).requires_grad_(), points(12, 5, 13).requires_grad_()
    angle_loss(student, teacher).backward()
    alone, student.grad = student.grad, None
    angle_loss(student, teacher).mul(-2.5).backward()
    torch.testing.assert_close(student.grad, -2.5 * alone)
    assert teacher.grad is None


def test_memory_grows_as_the_square_of_the_batch():
    student, teacher = points(256, 10, 14).requires_grad_(), points(256, 10, 15)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as seen:
        angle_loss(student, teacher).backward()
    sizes = [event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage > 0]
    assert max(sizes) <= 16 * 256 * 256 * 8


def test_without_numba_the_definition_is_used(monkeypatch):
    student, teacher = points(10, 5, 16), points(10, 5, 17)
    compiled = angle_loss(student, teacher)
    monkeypatch.setattr(dispatch, "NUMBA_IS_INSTALLED", False)
    assert torch.equal(angle_loss(student, teacher), chunked_angle_loss(student, teacher))
    torch.testing.assert_close(angle_loss(student, teacher), compiled, rtol=1e-5, atol=0)
