"""The fused loss: every path agrees with the float64 reference, and keeps its promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contracts import (
    ADJUSTMENTS,
    COMBINATIONS,
    LOSSES,
    LOSSES_IN_DOUBLE,
    PRECISION,
    LossCase,
    assert_agrees,
    assert_nan_stays_in_its_row,
    assert_row_of_weight_zero_is_not_read,
    assert_within,
    everything_at_once,
    expected,
    make_case,
    random_temperatures,
    random_weights,
    run_loss,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.loss import soft_target_loss as reference_loss
from reference.loss import soft_targets as reference_soft_targets

from coursepack.kernels import DenseRows, MixedLabels, soft_target_loss, soft_targets

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
EVERY_LOSS_IN_DOUBLE = pytest.mark.parametrize("loss", LOSSES_IN_DOUBLE.values(), ids=LOSSES_IN_DOUBLE)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("classes", [2, 10, 100, 1000, 21841])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_everything_at_once_float32(count, classes, combine):
    assert_agrees(soft_target_loss, everything_at_once(classes, count, combine, torch.float32))


@EVERY_LOSS_IN_DOUBLE
@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize(("classes", "count"), [(2, 1), (10, 8), (100, 2), (1000, 4), (21841, 3)])
def test_everything_at_once_float64(loss, classes, count, combine):
    assert_agrees(loss, everything_at_once(classes, count, combine, torch.float64))


ROWS, COUNT, CLASSES = 5, 3, 37
OPTIONS = {
    "defaults": {},
    "temperature 4": {"temperature": 4.0},
    "temperature 100": {"temperature": 100.0},
    "temperature 0.05": {"temperature": 0.05},
    "temperature of a tensor": {"temperature": torch.tensor(3.0)},
    "temperature per row": {"temperature": torch.tensor([0.5, 1.0, 4.0, 20.0, 100.0])},
    "teacher temperatures": {"temperature": 2.0, "teacher_temperature": [1.0, 4.0, 100.0]},
    "teacher temperatures (K,)": {"teacher_temperature": torch.tensor([1.0, 4.0, 50.0])},
    "teacher temperatures (K, N)": {"teacher_temperature": torch.linspace(0.5, 60, 15).reshape(3, 5)},
    "shift": {"adjustment": "shift", "temperature": 4.0},
    "smooth": {"adjustment": "smooth", "temperature": 4.0, "smoothing": 0.3},
    "smooth to a onehot": {"adjustment": "smooth", "smoothing": 0.0},
    "adjustment per teacher": {"adjustment": ["smooth", "none", "shift"], "temperature": 4.0},
    "weights (K,)": {"weights": torch.tensor([0.2, 0.5, 1.7])},
    "weights (N, K)": {"weights": torch.linspace(0.0, 2.0, 15).reshape(5, 3)},
    "weights of numbers": {"weights": [0.25, 0.25, 0.5]},
    "one weight is zero": {"weights": torch.tensor([0.0, 0.4, 0.6])},
    "all weights are zero": {"weights": torch.zeros(3), "hard_weight": 1.0},
    "hard weight": {"hard_weight": 0.3},
    "hard weight only": {"soft_weight": 0.0, "hard_weight": 0.3, "weights": torch.ones(3)},
    "negative soft weight": {"soft_weight": -0.4, "weights": torch.ones(3)},
    "row weight": {"row_weight": torch.tensor([0.0, 0.3, 1.0, -2.0, 7.0]), "hard_weight": 0.3},
    "other ignore_index": {"ignore_index": 255, "hard_weight": 0.3, "adjustment": "shift"},
}


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [(loss, torch.float32) for loss in LOSSES.values()]
    + [(loss, torch.float64) for loss in LOSSES_IN_DOUBLE.values()],
    ids=[*LOSSES, *(f"{name}, float64" for name in LOSSES_IN_DOUBLE)],
)
def test_one_option_at_a_time(loss, options, combine, dtype):
    temperature = torch.as_tensor(options.get("temperature", 1.0))
    if loss is LOSSES["plain"] and dtype == torch.float32 and temperature.max() > 8:
        pytest.skip("the plain definition cancels at large T: it is held to the bounds in float64")
    options = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    case = make_case(2, CLASSES, COUNT, ROWS, dtype, combine=combine, **options)
    if "ignore_index" in options:
        case.labels[1:3] = options["ignore_index"]
    assert_agrees(loss, case)


@pytest.mark.parametrize("combine", COMBINATIONS)
@EVERY_LOSS
def test_mixed_labels_agree(loss, combine):
    case = make_case(3, CLASSES, COUNT, ROWS, combine=combine, hard_weight=0.3, temperature=4.0)
    second = torch.tensor([5, -100, 7, int(case.labels[3]), 0])
    lam = torch.tensor([0.3, 0.6, 1.0, 0.25, 0.0], dtype=torch.float64)
    mixed = replace(case, labels=MixedLabels(case.labels, second, lam))
    assert_agrees(loss, mixed)
    case.student[4, case.labels[4]] = float("-inf")  # a label of share zero
    case.teachers[:, 4, case.labels[4]] = float("-inf")
    assert_agrees(loss, mixed)
    assert_agrees(loss, replace(mixed, student=case.student.float(), teachers=case.teachers.float()))


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@EVERY_LOSS
def test_encoded_rows_and_student_dtypes_agree(loss, dtype, combine):
    case = make_case(4, 100, 3, 6, torch.float32, temperature=4.0, hard_weight=0.2, combine=combine)
    case = case.with_options(weights=torch.tensor([0.2, 0.9, 0.4]))
    rows = [DenseRows(case.teachers[0].to(dtype)), case.teachers[1].to(dtype), case.teachers[2].double()]
    assert_agrees(loss, replace(case, teachers=rows))
    assert_agrees(loss, replace(case, teachers=rows, student=case.student.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
def test_extreme_logits(temperature, adjustment, combine, dtype):
    """Logits of 1e4, classes without any probability, weights of zero: the classes of both, and of one."""
    for seed in range(2):
        case = make_case(seed, 23, 4, 6, dtype, scale=1e4, combine=combine, temperature=temperature)
        rng = np.random.default_rng((5, seed))
        case.teachers[torch.from_numpy(rng.random((4, 6, 23)) < 0.3)] = float("-inf")
        case.teachers[:, torch.arange(6), case.labels] = torch.from_numpy(rng.normal(size=(4, 6))).to(dtype)
        nowhere = (case.labels + 1) % 23
        case.teachers[:, torch.arange(6), nowhere] = float("-inf")
        case.student[torch.arange(6), nowhere] = float("-inf")
        case = case.with_options(adjustment=adjustment, weights=random_weights(rng, (6, 4), dtype))
        if adjustment == "smooth":
            case = replace(case, student=case.student.nan_to_num(neginf=-1e4))
        result = run_loss(soft_target_loss, case)
        assert all(part.isfinite().all() for part in (result.loss, result.grad_student, result.grad_weights))
        assert_agrees(soft_target_loss, case)
        if dtype == torch.float64:
            assert_agrees(LOSSES["plain"], case)


@pytest.mark.parametrize("combine", COMBINATIONS)
@EVERY_LOSS
def test_class_impossible_to_the_student_only(loss, combine):
    case = make_case(6, 9, 2, 3, torch.float64, combine=combine, weights=torch.ones(3, 2).double())
    case.student[1, 4] = float("-inf")
    got, want = run_loss(loss, case), expected(case)
    assert got.loss[1] == want.loss[1] == float("inf")
    assert got.loss[[0, 2]].isfinite().all()
    if loss is soft_target_loss:
        assert_within("gradient", got.grad_student, want.grad_student, np.full((3, 9), 1e-12))


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_class_impossible_to_the_student_and_to_every_teacher_that_counts(combine):
    case = make_case(9, 9, 2, 3, combine=combine, weights=torch.tensor([0.0, 1.0], dtype=torch.float64))
    case.student[1, 4] = case.teachers[1, 1, 4] = float("-inf")
    got, want = run_loss(soft_target_loss, case), expected(case)
    assert_within("loss", got.loss, want.loss, 1e-12 * want.loss_size)
    bound = np.broadcast_to(1e-12 * want.student_size[:, None], (3, 9))
    assert_within("gradient", got.grad_student, want.grad_student, bound)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(data=st.data())
def test_random_combinations(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, count, classes = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 60))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    case = make_case(
        int(rng.integers(2**32)), classes, count, rows, dtype, draw(st.sampled_from([0.01, 1, 9, 1e4]))
    )
    mixed = draw(st.booleans())
    if mixed:
        lam = torch.from_numpy(rng.choice([0, 1, rng.random()], rows)).to(dtype)
        case = replace(case, labels=MixedLabels(case.labels, case.labels.flip(0), lam))
    elif draw(st.booleans()):
        case.labels[int(rng.integers(rows))] = -100
    shapes = st.sampled_from([None, (count,), (rows, count)])
    weights, temperatures = draw(shapes), draw(shapes)
    case = case.with_options(
        weights=None if weights is None else random_weights(rng, weights, dtype),
        temperature=draw(st.sampled_from([0.1, 1.0, 4.0, 100.0, random_temperatures(rng, rows, dtype)])),
        teacher_temperature=None
        if temperatures is None
        else random_temperatures(rng, temperatures[::-1], dtype),
        adjustment="none"
        if mixed
        else draw(st.lists(st.sampled_from(ADJUSTMENTS), min_size=count, max_size=count)),
        smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        combine=draw(st.sampled_from(COMBINATIONS)),
        soft_weight=draw(st.sampled_from([0.0, 0.9, 1.0])),
        hard_weight=draw(st.sampled_from([0.0, 0.1, 1.0])),
        row_weight=draw(st.sampled_from([None, torch.from_numpy(rng.integers(0, 3, rows) * 0.7).to(dtype)])),
    )
    assert_agrees(soft_target_loss, case)
    if dtype == torch.float64:
        assert_agrees(LOSSES["plain"], case)


class Recomputed(torch.autograd.Function):
    """A loss whose backward calls it afresh: its gradient serves one backward, gradcheck asks for many."""

    @staticmethod
    def forward(ctx, student, weights, loss, case):
        ctx.save_for_backward(student, weights)
        ctx.loss, ctx.case = loss, case
        return loss(student, case.teachers, case.labels, weights=weights, **case.options)

    @staticmethod
    def backward(ctx, upstream):
        student, weights = ctx.saved_tensors
        case = replace(ctx.case, student=student).with_options(weights=weights)
        with torch.enable_grad():
            result = run_loss(ctx.loss, case, upstream)
        return result.grad_student, result.grad_weights, None, None


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
@EVERY_LOSS_IN_DOUBLE
def test_gradcheck(loss, adjustment, combine):
    case = make_case(7, 5, 3, 4, combine=combine, adjustment=adjustment, temperature=3.0, hard_weight=0.3)
    weights = torch.linspace(0.1, 1.4, 12, dtype=torch.float64).reshape(4, 3).requires_grad_(True)
    student = case.student.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z, w: Recomputed.apply(z, w, loss, case), (student, weights))


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
def test_reference_gradients_are_finite_differences_of_its_loss(adjustment, combine):
    rng = np.random.default_rng(8)
    student, teachers = rng.normal(size=(3, 6)) * 2, rng.normal(size=(2, 3, 6)) * 2
    weights = rng.uniform(0.1, 1.5, (3, 2))
    options = {
        "labels": np.array([1, -100, 4]),
        "temperature": np.array([1.0, 3.0, 7.0]),
        "teacher_temperature": np.array([2.0, 5.0]),
        "adjustment": adjustment,
        "combine": combine,
        "soft_weight": 0.8,
        "hard_weight": 0.3,
        "row_weight": np.array([1.0, 2.0, 0.5]),
    }

    def loss_sum(z, w):
        return reference_loss(z, teachers, weights=w, **options).loss.sum()

    answer = reference_loss(student, teachers, weights=weights, **options)
    for values, gradient in ((student, answer.grad_student), (weights, answer.grad_weights)):
        for at in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[at] = 1e-5
            if values is student:
                slope = (loss_sum(student + step, weights) - loss_sum(student - step, weights)) / 2e-5
            else:
                slope = (loss_sum(student, weights + step) - loss_sum(student, weights - step)) / 2e-5
            assert slope == pytest.approx(gradient[at], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
@EVERY_LOSS
def test_nan_stays_in_its_row(loss, adjustment, combine):
    case = make_case(20, 33, 3, 5, torch.float32, adjustment=adjustment, combine=combine, hard_weight=0.2)
    case = case.with_options(weights=torch.linspace(0.1, 1.5, 15).reshape(5, 3), temperature=2.0)
    case.teachers[0, 2, case.labels[2]] = 99.0
    assert_nan_stays_in_its_row(loss, case, row=2)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("adjustment", ADJUSTMENTS)
@EVERY_LOSS
def test_row_of_weight_zero_is_not_read(loss, adjustment, combine):
    case = make_case(21, 33, 3, 5, torch.float32, adjustment=adjustment, combine=combine, hard_weight=0.2)
    case = case.with_options(weights=torch.linspace(0.1, 1.5, 15).reshape(5, 3), temperature=2.0)
    assert_row_of_weight_zero_is_not_read(loss, case, row=2)


@pytest.mark.parametrize("upstream", [1.0, 2.5])
@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [LOSSES[name] for name in ("kernel", "op", "analytic")])
def test_reduction(loss, reduction, dtype, combine, upstream):
    rows = 7  # a seventh is rounded
    case = make_case(28, 10, 2, rows, dtype, temperature=2.0, hard_weight=0.3, combine=combine)

    def run(reduce, **options):
        student = case.student.clone().requires_grad_(True)
        weights = torch.tensor([0.3, 0.9], requires_grad=True)
        value = loss(student, case.teachers, case.labels, weights=weights, **options, **case.options)
        (upstream * reduce(value)).backward()
        return reduce(value).detach(), student.grad, weights.grad

    outside = run(getattr(torch, reduction))
    inside = run(lambda value: value, reduction=reduction)
    # The gradient of a mean is rounded once inside, and twice outside.
    tolerance = {"rtol": 2e-2, "atol": 0} if dtype == torch.bfloat16 else {}
    for one, other in zip(inside, outside, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    assert inside[0].shape == ()
    if reduction == "sum" and upstream == 1:
        assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize("divergence", ["kl", "js"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_adds_rows_up_in_their_order_in_float64(threads, divergence):
    rows = 1000  # enough for two threads
    case = make_case(30, 100, 2, rows, torch.float32)
    each = soft_target_loss(case.student, case.teachers, divergence=divergence)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):  # threads end in another order
            for reduction, factor in (("sum", 1.0), ("mean", 1 / rows)):
                total = soft_target_loss(
                    case.student, case.teachers, divergence=divergence, reduction=reduction
                )
                assert total.item() == np.float32(sum(each.tolist()) * factor)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_row_that_is_not_a_number_makes_the_total_none(reduction):
    case = make_case(31, 10, 2, 600, torch.float32)
    case.student[123, 4] = torch.nan
    assert soft_target_loss(case.student, case.teachers, reduction=reduction).isnan()


@pytest.mark.parametrize("loss", [LOSSES[name] for name in ("kernel", "analytic")])
@pytest.mark.parametrize("power", [1, 2])
def test_the_gradient_of_a_gradient_is_refused(loss, power):
    case = make_case(32, 10, 2, 5, torch.float32)

    def gradient(**options):
        student = case.student.clone().requires_grad_(True)
        value = loss(student, case.teachers).sum() ** power
        return torch.autograd.grad(value, student, **options)[0]

    once = gradient(create_graph=True)
    assert torch.equal(once.detach(), gradient())
    with pytest.raises(RuntimeError, match="differentiate twice a function"):
        once.sum().backward()


def test_mean_of_no_rows():
    case = make_case(29, 5, 2, 0, torch.float32)
    student = case.student.requires_grad_(True)
    mean = soft_target_loss(student, case.teachers, reduction="mean")
    mean.backward()
    assert mean.isnan()
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_backward_is_a_clear_error(reduction):
    case = make_case(22, 10, 2)
    student = case.student.float().requires_grad_(True)
    for retain in (False, True):
        total = soft_target_loss(student, case.teachers, reduction=reduction).sum()
        total.backward(retain_graph=retain)
        with pytest.raises(RuntimeError, match="one backward pass only: call it again"):
            total.backward()


@EVERY_LOSS
def test_only_what_asks_gets_a_gradient(loss):
    case = make_case(23, 10, 2, dtype=torch.float32, weights=torch.tensor([0.3, 0.9]), hard_weight=0.2)
    both = run_loss(loss, case)
    none = run_loss(loss, case, student=False, weights=False)
    only_student, only_weights = run_loss(loss, case, weights=False), run_loss(loss, case, student=False)
    assert none.grad_student is none.grad_weights is only_student.grad_weights is None
    assert only_weights.grad_student is None
    assert torch.equal(only_student.grad_student, both.grad_student)
    assert torch.equal(only_weights.grad_weights, both.grad_weights)
    for result in (none, only_student, only_weights):
        assert torch.equal(result.loss, both.loss)
    assert not loss(case.student, case.teachers).requires_grad


@EVERY_LOSS
def test_teachers_never_get_a_gradient(loss):
    case = make_case(24, 10, 2, dtype=torch.float32)
    teachers = case.teachers.requires_grad_(True)
    rows = [DenseRows(teachers[0]), teachers[1]]
    assert not loss(case.student, teachers).requires_grad
    assert not loss(case.student, rows).requires_grad
    assert not soft_targets(rows).requires_grad


@EVERY_LOSS
def test_memory_layout_does_not_matter(loss):
    case = make_case(25, 16, 3, 8, torch.float32, temperature=2.0, adjustment="shift", hard_weight=0.5)
    strided = LossCase(
        case.student.t().contiguous().t(),
        case.teachers.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([case.labels, case.labels], 1)[:, 0],
        case.options,
    )
    assert not strided.student.is_contiguous()
    assert_agrees(loss, strided)
    assert_agrees(loss, replace(case, student=torch.cat([case.student] * 2, 1)[:, 8:24]))


@EVERY_LOSS
def test_no_rows_give_no_losses(loss):
    result = run_loss(loss, make_case(26, 5, 2, 0, torch.float32, temperature=2.0, hard_weight=0.5))
    assert result.loss.shape == (0,)
    assert result.grad_student.shape == (0, 5)


def test_autocast_changes_nothing():
    case = make_case(27, 10, 2, dtype=torch.float32, temperature=4.0, hard_weight=0.5)
    want = run_loss(soft_target_loss, case)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_loss(soft_target_loss, case)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad_student, want.grad_student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("classes", [2, 100, 21841])
def test_soft_targets_are_the_mixture(classes, dtype):
    case = everything_at_once(classes, 3, "mixture", dtype)
    names = ("weights", "temperature", "teacher_temperature", "adjustment", "smoothing")
    options = {name: case.options[name] for name in names}
    weights = options["weights"].clone().requires_grad_(True)
    got = soft_targets(case.teachers, case.labels, **{**options, "weights": weights})
    assert got.dtype == dtype
    numbers = {name: x.double().numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    want, parts = reference_soft_targets(case.teachers.double().numpy(), case.labels.numpy(), **numbers)
    precision = PRECISION[dtype]
    largest = want.max(1, keepdims=True)
    assert_within("soft targets", got, want, np.broadcast_to(precision * largest, want.shape))
    upstream = torch.from_numpy(np.random.default_rng(28).normal(size=want.shape)).to(dtype)
    got.backward(upstream)
    slopes = upstream.double().numpy()[:, None] * parts
    bound = 10 * precision * np.abs(slopes).sum(2)
    assert_within("gradient to weights", weights.grad, slopes.sum(2), bound)


def test_soft_targets_of_one_plain_teacher_are_its_softmax():
    teacher = make_case(29, 10, 1).teachers[0]
    torch.testing.assert_close(soft_targets(teacher[None]), teacher.softmax(1), rtol=1e-13, atol=0)
    assert soft_targets([teacher.half(), DenseRows(teacher.float())]).dtype == torch.float32


@pytest.mark.gpu
@EVERY_LOSS
def test_contract_on_cuda(loss):
    for combine, classes in (("mixture", 21841), ("sum", 1000), ("mixture", 10)):
        assert_agrees(loss, everything_at_once(classes, 4, combine, torch.float64).to("cuda"))
        case = everything_at_once(classes, 4, combine, torch.float32)
        if loss is soft_target_loss:
            assert_agrees(loss, case.to("cuda"))
    case = make_case(30, 33, 3, 5, torch.float32, adjustment="shift", hard_weight=0.2)
    case = case.with_options(weights=torch.linspace(0.1, 1.5, 15).reshape(5, 3)).to("cuda")
    assert_nan_stays_in_its_row(loss, case, row=2)
    assert_row_of_weight_zero_is_not_read(loss, case, row=2)


@pytest.mark.gpu
@EVERY_LOSS
def test_bad_values_turn_to_nan_on_cuda_without_waiting(loss):
    case = make_case(31, 33, 3, 6, torch.float32, adjustment="shift", hard_weight=0.2)
    weights = torch.linspace(0.1, 1.5, 18).reshape(6, 3)
    temperature, row_weight = torch.full((6,), 2.0), torch.ones(6)
    good = case.with_options(weights=weights, temperature=temperature, row_weight=row_weight)
    clean = run_loss(loss, good.to("cuda"))
    case.labels[0], case.labels[1] = 33, -1
    weights[2, 1], temperature[3], row_weight[4] = -1.0, 101.0, float("nan")
    bad = case.with_options(weights=weights, temperature=temperature, row_weight=row_weight).to("cuda")
    upstream = torch.ones(6, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run_loss(loss, bad, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for part in ("loss", "grad_student", "grad_weights"):
        got = getattr(result, part)
        assert got[:5].isnan().all(), f"{part} of bad rows is not NaN"
        assert torch.equal(got[5], getattr(clean, part)[5])
