"""What must hold for the fused loss whatever its formula is written like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracts import COMBINATIONS, LOSSES_IN_DOUBLE, LossCase, assert_within, make_case, run_loss

from coursepack.kernels import MixedLabels, soft_target_loss

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES_IN_DOUBLE.values(), ids=LOSSES_IN_DOUBLE)


def random_pair(seed, rows=4, classes=9, scale=2.0):
    """Student and teacher logits, float64."""
    rng = np.random.default_rng(seed)
    return tuple(torch.from_numpy(rng.normal(size=(rows, classes)) * scale) for _ in range(2))


def with_gradient(loss, student, teachers, labels=None, **options):
    """Loss and gradient to the student."""
    result = run_loss(loss, LossCase(student, teachers, labels, options))
    return result.loss, result.grad_student


@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0, 100.0])
@pytest.mark.parametrize("combine", COMBINATIONS)
@EVERY_LOSS
def test_divergence_of_equals_is_zero(loss, combine, temperature):
    student, _ = random_pair(10)
    value, gradient = with_gradient(
        loss, student, student.repeat(3, 1, 1), temperature=temperature, combine=combine
    )
    assert_within("loss", value, np.zeros(4), np.full(4, 1e-11))
    assert_within("gradient", gradient, np.zeros((4, 9)), np.full((4, 9), 1e-12))


def test_divergence_of_equals_does_not_grow_with_the_temperature_in_float32():
    student = random_pair(11, scale=50.0)[0].float()
    for temperature in (0.1, 1.0, 100.0):
        value = soft_target_loss(student, student[None], temperature=temperature)
        assert_within("loss", value, np.zeros(4), np.full(4, 1e-9))


@EVERY_LOSS
def test_matches_torch_kl_div_with_batchmean(loss):
    student, teacher = random_pair(12)
    got = loss(student, teacher[None], temperature=4.0).mean()
    log_q, p = F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1)
    torch.testing.assert_close(got, F.kl_div(log_q, p, reduction="batchmean") * 16, rtol=1e-12, atol=0)


@EVERY_LOSS
def test_hard_weight_alone_is_cross_entropy(loss):
    student, teacher = random_pair(13)
    labels = torch.tensor([3, -100, 8, 0])
    got, gradient = with_gradient(loss, student, teacher[None], labels, soft_weight=0.0, hard_weight=1.0)
    z = student.clone().requires_grad_(True)
    want = F.cross_entropy(z, labels, reduction="none")
    want.sum().backward()
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, z.grad, rtol=1e-12, atol=1e-14)


@EVERY_LOSS
def test_mixed_labels_are_the_weighted_sum(loss):
    student, teacher = random_pair(14)
    first, second = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 1, 7, 8])
    lam = torch.tensor([0.0, 0.4, 0.8, 1.0], dtype=torch.float64)
    options = {"temperature": 2.0, "hard_weight": 0.5}
    mixed = with_gradient(loss, student, teacher[None], MixedLabels(first, second, lam), **options)
    ones = with_gradient(loss, student, teacher[None], first, **options)
    others = with_gradient(loss, student, teacher[None], second, **options)
    for got, one, other in zip(mixed, ones, others, strict=True):
        share = lam.reshape((4,) + (1,) * (got.ndim - 1))
        torch.testing.assert_close(got, share * one + (1 - share) * other, rtol=1e-12, atol=1e-14)


@EVERY_LOSS
def test_shift_of_logits_is_the_shift_of_probabilities(loss):
    student, teacher = random_pair(15)
    labels = (teacher.argmax(1) + 2) % 9
    probs = torch.softmax(teacher / 3, 1)
    rows, top = torch.arange(4), teacher.argmax(1)
    swapped = probs.clone()
    swapped[rows, labels], swapped[rows, top] = probs[rows, top], probs[rows, labels]
    got = loss(student, teacher[None], labels, temperature=3.0, adjustment="shift")
    want = loss(student, 3 * swapped.log()[None], temperature=3.0)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert (got != loss(student, teacher[None], temperature=3.0)).all()


@pytest.mark.parametrize("adjustment", ["shift", "smooth"])
@EVERY_LOSS
def test_teachers_that_are_right_or_tie_with_the_label_are_left_alone(loss, adjustment):
    student, teacher = random_pair(16)
    labels = teacher.argmax(1)
    teacher[1, (labels[1] + 4) % 9] = teacher[1].max()  # a tie above and
    teacher[2, (labels[2] + 1) % 9] = teacher[2].max()  # below the label
    adjusted = loss(student, teacher[None], labels, adjustment=adjustment)
    assert torch.equal(adjusted, loss(student, teacher[None], labels))
    ignored = loss(student, teacher[None], torch.full((4,), -100), adjustment=adjustment)
    assert torch.equal(ignored, adjusted)


@EVERY_LOSS
def test_ties_of_two_wrong_maxima_go_to_the_lowest_class(loss):
    teacher = torch.tensor([[1.0, 5.0, 0.0, 5.0]], dtype=torch.float64)
    student, label = torch.tensor([[0.3, 2.0, -1.0, 0.5]], dtype=torch.float64), torch.tensor([2])
    swapped = torch.tensor([[[1.0, 0.0, 5.0, 5.0]]], dtype=torch.float64)
    got = loss(student, teacher[None], label, adjustment="shift")
    torch.testing.assert_close(got, loss(student, swapped), rtol=1e-14, atol=0)


@pytest.mark.parametrize("combine", COMBINATIONS)
@EVERY_LOSS
def test_equal_teachers_equal_one_teacher(loss, combine):
    student, teacher = random_pair(17)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    options = {"temperature": 4.0, "combine": combine}
    many = with_gradient(loss, student, teacher.repeat(3, 1, 1), weights=weights, **options)
    for got, want in zip(many, with_gradient(loss, student, teacher[None], **options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@EVERY_LOSS
def test_mixture_and_sum_agree_in_the_student_gradient_only(loss):
    case = make_case(18, 12, 3, weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), temperature=2.0)
    mixture, summed = (run_loss(loss, case.with_options(combine=name)) for name in COMBINATIONS)
    torch.testing.assert_close(mixture.grad_student, summed.grad_student, rtol=1e-11, atol=1e-13)
    assert (mixture.loss < summed.loss - 1e-3).any()
    assert not torch.allclose(mixture.grad_weights, summed.grad_weights, rtol=1e-3)


@EVERY_LOSS
def test_gradient_norm_is_flat_in_the_temperature(loss):
    student, teacher = random_pair(19, classes=50, scale=1.0)
    norms = [
        float(with_gradient(loss, student, teacher[None], temperature=t)[1].norm()) for t in (10, 30, 100)
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=0.1)
