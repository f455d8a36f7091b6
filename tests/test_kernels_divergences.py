"""The divergences beside KL(teachers || student): the same contract, and what each is known for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contracts import (
    COMBINATIONS,
    LOSSES,
    analytic_loss,
    assert_agrees,
    assert_nan_stays_in_its_row,
    assert_row_of_weight_zero_is_not_read,
    everything_at_once,
    make_case,
    plain_loss,
    run_loss,
)
from reference.loss import soft_target_loss as reference_loss
from test_kernels_paths import KINDS

from coursepack.kernels import describe, soft_target_loss

OTHERS = ("reverse_kl", "js", "mse")
BOTH = pytest.mark.parametrize("loss", [soft_target_loss, plain_loss], ids=["public", "plain"])
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
EVERY = pytest.mark.parametrize("divergence", OTHERS)
EVERY_COMBINATION = pytest.mark.parametrize("combine", COMBINATIONS)


def case_of(divergence, combine, dtype=torch.float64, classes=40):
    case = everything_at_once(classes, 4, combine, dtype).with_options(divergence=divergence)
    names = ["none", "shift", "none", "shift"] if divergence == "mse" else ["none", "shift", "smooth", "none"]
    return case.with_options(adjustment=names)


@BOTH
@EVERY
@EVERY_COMBINATION
@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
def test_everything_at_once(loss, divergence, combine, classes):
    assert_agrees(loss, case_of(divergence, combine, classes=classes))


@EVERY_LOSS
@EVERY
@EVERY_COMBINATION
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_float32(loss, divergence, combine, temperature):
    case = make_case(3, 50, 3, 6, torch.float32, divergence=divergence, combine=combine)
    weights = torch.linspace(0.1, 1.4, 18).reshape(6, 3)
    case = case.with_options(temperature=temperature, hard_weight=0.3, weights=weights)
    assert_agrees(loss, case, precision=2e-6)


@EVERY
@EVERY_COMBINATION
@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 1100])
def test_everything_at_once_in_the_kernel(divergence, combine, classes):
    case = case_of(divergence, combine, torch.float32, classes)
    assert describe(case.student, case.teachers, case.labels, **case.options).path == "kernel"
    assert_agrees(soft_target_loss, case, precision=2e-6)


@EVERY
@EVERY_COMBINATION
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [17, 129])
def test_every_kind_of_rows(divergence, combine, kind, classes):
    case = make_case(4, classes, 1, 5, torch.float32, divergence=divergence, combine=combine)
    teachers = [KINDS[kind](5, classes), case.teachers[0]]
    case = replace(case, teachers=teachers).with_options(
        temperature=2.0, hard_weight=0.4, weights=torch.linspace(0.2, 1.3, 10).reshape(5, 2)
    )
    got, want = run_loss(soft_target_loss, case), run_loss(analytic_loss, case)
    for part in ("loss", "grad_student", "grad_weights"):
        torch.testing.assert_close(getattr(got, part), getattr(want, part), rtol=2e-5, atol=2e-5)


@BOTH
@EVERY
@EVERY_COMBINATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contract_of_rows(loss, divergence, combine, dtype):
    case = make_case(20, 33, 3, 5, dtype, divergence=divergence, combine=combine, hard_weight=0.2)
    weights = torch.linspace(0.1, 1.5, 15, dtype=dtype).reshape(5, 3)
    case = case.with_options(weights=weights, temperature=2.0)
    if divergence != "mse":  # there a NaN reaches the gradient of its own class only
        assert_nan_stays_in_its_row(loss, case, row=2)
    assert_row_of_weight_zero_is_not_read(loss, case, row=2)


@EVERY
@EVERY_COMBINATION
def test_reference_gradients_are_finite_differences_of_its_loss(divergence, combine):
    rng = np.random.default_rng(8)
    student, teachers = rng.normal(size=(3, 6)) * 2, rng.normal(size=(2, 3, 6)) * 2
    weights = rng.uniform(0.1, 1.5, (3, 2))
    options = {"temperature": np.array([1.0, 3.0, 7.0]), "teacher_temperature": np.array([2.0, 5.0])}
    options |= {"divergence": divergence, "combine": combine, "soft_weight": 0.8}

    def total(z, w):
        return reference_loss(z, teachers, weights=w, **options).loss.sum()

    answer = reference_loss(student, teachers, weights=weights, **options)
    for values, gradient in ((student, answer.grad_student), (weights, answer.grad_weights)):
        for at in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[at] = 1e-5
            if values is student:
                slope = (total(student + step, weights) - total(student - step, weights)) / 2e-5
            else:
                slope = (total(student, weights + step) - total(student, weights - step)) / 2e-5
            assert slope == pytest.approx(gradient[at], rel=1e-6, abs=1e-8)


@EVERY
@EVERY_COMBINATION
def test_gradients_are_those_of_autograd(divergence, combine):
    """Of the plain definition, to the precision of float64; and gradcheck of that."""
    case = case_of(divergence, combine, classes=7)
    got, want = run_loss(soft_target_loss, case), run_loss(plain_loss, case)
    torch.testing.assert_close(got.grad_student, want.grad_student, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.grad_weights, want.grad_weights, rtol=1e-11, atol=1e-12)
    options = {name: value for name, value in case.options.items() if name != "weights"}
    inputs = (case.student.requires_grad_(True), (case.options["weights"] + 0.1).requires_grad_(True))
    assert torch.autograd.gradcheck(
        lambda z, w: plain_loss(z, case.teachers, case.labels, weights=w, **options), inputs
    )


@EVERY
def test_of_equals_it_is_zero(divergence):
    student = make_case(1, 9, 1).student
    loss = soft_target_loss(student, student.repeat(2, 1, 1), divergence=divergence, temperature=3.0)
    assert loss.abs().max() <= 1e-14


def test_reverse_kl_is_kl_with_the_sides_exchanged():
    case = make_case(2, 9, 1)
    there = soft_target_loss(case.student, case.teachers, divergence="reverse_kl", temperature=3.0)
    back = soft_target_loss(case.teachers[0], case.student[None], temperature=3.0)
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)


def test_jensen_shannon_is_symmetric_and_at_most_log_2():
    case = make_case(3, 9, 1, scale=50.0)
    there = soft_target_loss(case.student, case.teachers, divergence="js")
    back = soft_target_loss(case.teachers[0], case.student[None], divergence="js")
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)
    assert there.max() <= np.log(2)
    assert there.max() > 0.6


def test_squared_error_of_logits_does_not_depend_on_a_common_temperature():
    case = make_case(4, 9, 1)
    want = (case.student - case.teachers[0]).square().mean(1)
    for temperature in (0.5, 1.0, 8.0):
        got = soft_target_loss(case.student, case.teachers, divergence="mse", temperature=temperature)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_impossible_classes_give_finite_answers(divergence):
    for dtype in (torch.float32, torch.float64):
        case = make_case(
            5, 9, 2, 4, dtype, divergence=divergence, weights=torch.tensor([0.5, 0.5], dtype=dtype)
        )
        case.teachers[:, :, 3] = float("-inf")
        case.student[2, 3] = float("-inf")
        result = run_loss(soft_target_loss, case)
        assert all(part.isfinite().all() for part in (result.loss, result.grad_student, result.grad_weights))


@EVERY
@EVERY_COMBINATION
def test_threads_do_not_change_a_bit(divergence, combine):
    case = make_case(5, 700, 3, 97, torch.float32, divergence=divergence, combine=combine)
    case = case.with_options(weights=torch.rand(97, 3, generator=torch.Generator().manual_seed(0)))
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            assert describe(case.student, case.teachers, case.labels, **case.options).threads == count
            results.append(run_loss(soft_target_loss, case))
    finally:
        torch.set_num_threads(before)
    for part in ("loss", "grad_student", "grad_weights"):
        assert torch.equal(*(getattr(result, part) for result in results))
