"""Checks that every member of a family passes: a new member is tested by being listed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from reference.loss import soft_target_loss as expected_loss

from coursepack.kernels import DenseRows, MixedLabels, dispatch, soft_target_loss
from coursepack.kernels import reference as plain
from coursepack.kernels.spec import LossSpec, check_call
from coursepack.kernels.values import check_values, full_weights

if TYPE_CHECKING:
    from collections.abc import Callable

ADJUSTMENTS = ("none", "shift", "smooth")
COMBINATIONS = ("mixture", "sum")
# Rounding errors in units of the magnitudes before cancellation.
PRECISION = {torch.float32: 1e-6, torch.float64: 1e-12}


def plain_loss(student_logits, teachers, labels=None, *, weights=None, **options):
    """The plain definition behind the same door as `soft_target_loss`."""
    call = check_call(student_logits, teachers, labels, LossSpec(weights=weights, **options))
    return plain.loss(student_logits, full_weights(call), check_values(call))


def analytic_loss(student_logits, teachers, labels=None, **options):
    """The analytic path behind the same door, whatever else could serve."""
    with mock.patch.object(dispatch, "choose", return_value=(dispatch.ANALYTIC, "a test")):
        return soft_target_loss(student_logits, teachers, labels, **options)


def op_loss(student_logits, teachers, labels=None, **options):
    """The operator of `torch.compile` behind the same door, where it is of use."""
    call = check_call(student_logits, teachers, labels, LossSpec(**options))
    path, reason = dispatch.choose(student_logits, call)
    path = dispatch.OP if path == dispatch.KERNEL else path
    with mock.patch.object(dispatch, "choose", return_value=(path, reason)):
        return soft_target_loss(student_logits, teachers, labels, **options)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "kernel": soft_target_loss,
    "op": op_loss,
    "analytic": analytic_loss,
    "plain": plain_loss,
}
"""Every path that computes the fused loss, with the signature of `soft_target_loss`."""

LOSSES_IN_DOUBLE = {name: LOSSES[name] for name in ("analytic", "plain")}
"""Paths that compute in float64: kernel and operator leave it to the analytic one."""


@dataclass(frozen=True)
class LossCase:
    """One call of the fused loss, without gradients."""

    student: torch.Tensor
    teachers: Any
    labels: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> LossCase:
        return replace(self, options={**self.options, **options})

    def to(self, device: str) -> LossCase:
        return LossCase(*(_move(x, device) for x in (self.student, self.teachers, self.labels, self.options)))


def make_case(seed, classes, count, rows=4, dtype=torch.float64, scale=3.0, **options):
    """Random logits and labels; the teachers are right about half of the time."""
    rng = np.random.default_rng((seed, classes, count, rows))
    labels = rng.integers(0, classes, rows)
    teachers = rng.normal(size=(count, rows, classes)) * scale
    right = rng.random((count, rows)) < 0.5
    for k, n in np.argwhere(right):
        teachers[k, n, labels[n]] = teachers[k, n].max() + 0.5
    return LossCase(
        torch.from_numpy(rng.normal(size=(rows, classes)) * scale).to(dtype),
        torch.from_numpy(teachers).to(dtype),
        torch.from_numpy(labels),
        options,
    )


def random_weights(rng, shape, dtype):
    """Weights that do not sum to one, some of them zero."""
    weights = rng.uniform(0.05, 2.0, shape) * (rng.random(shape) < 0.8)
    return torch.from_numpy(weights).to(dtype)


def random_temperatures(rng, shape, dtype):
    """From 0.2 to 100, with 100 itself."""
    values = np.exp(rng.uniform(np.log(0.2), np.log(100), shape))
    values.flat[0] = 100.0
    return torch.from_numpy(values).to(dtype)


def everything_at_once(classes, count, combine, dtype, rows=4, scale=3.0):
    """A case with every option set: each reaches every number of teachers and classes."""
    case = make_case(0, classes, count, rows, dtype, scale)
    rng = np.random.default_rng((1, classes, count))
    case.labels[0] = -100
    adjustment = [ADJUSTMENTS[(k + classes) % 3] for k in range(count)]
    return case.with_options(
        combine=combine,
        weights=random_weights(rng, (rows, count), dtype),
        temperature=random_temperatures(rng, rows, dtype),
        teacher_temperature=random_temperatures(rng, (count, rows), dtype),
        adjustment=adjustment,
        smoothing=0.15,
        soft_weight=0.7,
        hard_weight=0.3,
        row_weight=torch.from_numpy(np.append(rng.uniform(0.1, 2, rows - 1), 0.0)).to(dtype),
    )


@dataclass(frozen=True)
class Result:
    """What a path answered; a gradient that was not asked for is None."""

    loss: torch.Tensor
    grad_student: torch.Tensor | None
    grad_weights: torch.Tensor | None


def run_loss(loss, case, upstream=None, student=True, weights=True):
    """Call a path and pull its gradients back from `upstream` `(N,)`, ones by default."""
    z = case.student.detach().clone().requires_grad_(student)
    options = dict(case.options)
    given = options.get("weights")
    w = None
    if weights and isinstance(given, torch.Tensor):
        w = options["weights"] = given.detach().clone().requires_grad_(True)
    value = loss(z, case.teachers, case.labels, **options)
    if value.requires_grad:
        value.backward(torch.ones_like(value) if upstream is None else upstream)
    return Result(value.detach(), z.grad, None if w is None else w.grad)


def expected(case):
    """The reference's answer to a case."""
    teachers = case.teachers.unbind(0) if isinstance(case.teachers, torch.Tensor) else case.teachers
    labels = case.labels
    if isinstance(labels, MixedLabels):
        labels = (_numpy(labels.first), _numpy(labels.second), _numpy(labels.lam))
    options = {name: _numpy(value) for name, value in case.options.items()}
    double = case.student.dtype == torch.float64
    return expected_loss(
        _numpy(case.student),
        np.stack([_numpy(teacher) for teacher in teachers]),
        _numpy(labels),
        tiny=float(torch.finfo(torch.float64 if double else torch.float32).tiny),
        **options,
    )


def assert_agrees(loss, case, precision=None):
    """Loss and both gradients lie within the bounds around the reference."""
    dtype = torch.float64 if case.student.dtype == torch.float64 else torch.float32
    precision = precision or PRECISION[dtype]
    rows = case.student.shape[0]
    factors = np.random.default_rng(rows).uniform(0.5, 2.0, rows).astype(np.float32).astype(np.float64)
    upstream = torch.from_numpy(factors).to(case.student.device, dtype)
    got, want = run_loss(loss, case, upstream), expected(case)
    assert got.loss.dtype == dtype
    assert_within("loss", got.loss, want.loss, precision * want.loss_size)

    assert got.grad_student is not None
    assert got.grad_student.dtype == case.student.dtype
    grad = want.grad_student * factors[:, None]
    bound = np.broadcast_to((precision * want.student_size * factors)[:, None], grad.shape)
    if case.student.dtype != dtype:
        # Rounded once when made and once when scaled, to a dtype with few digits and a high floor.
        info = torch.finfo(case.student.dtype)
        bound = bound + info.eps * np.abs(grad) + 2 * info.smallest_normal * info.eps
    assert_within("gradient to student_logits", got.grad_student, grad, bound)

    if got.grad_weights is not None:
        grad, bound = want.grad_weights * factors[:, None], want.weights_size * factors[:, None]
        if got.grad_weights.ndim == 1:
            grad, bound = grad.sum(0), bound.sum(0)
        assert_within("gradient to weights", got.grad_weights, grad, precision * bound)


def assert_within(name, got, want, bound):
    """|got - want| <= bound everywhere; an infinity must be the same infinity."""
    got = got.detach().cpu().double().numpy()
    assert got.shape == want.shape, f"{name} has shape {got.shape}, expected {want.shape}"
    same = got == want
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0, np.abs(got - want))
    wrong = ~(same | (error <= bound) & np.isfinite(bound))
    if wrong.any():
        ratio = np.where(wrong, error / np.maximum(bound, np.finfo(float).tiny), 0)
        at = np.unravel_index(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)), got.shape)
        place = tuple(int(i) for i in at)
        raise AssertionError(
            f"{name}{place} is {got[at]!r}, expected {want[at]!r}: error {error[at]:.3g}, "
            f"bound {bound[at]:.3g}; {wrong.sum()} of {wrong.size} values are out of bounds"
        )


def assert_nan_stays_in_its_row(loss, case, row):
    """NaN logits of the student or of a teacher reach their own row only, bit for bit."""
    clean = run_loss(loss, case)
    teachers = case.teachers.clone()
    teachers[0, row, 1] = float("nan")
    student = case.student.clone()
    student[row, 0] = float("nan")
    others = torch.arange(case.student.shape[0], device=student.device) != row
    for name, poisoned in (
        ("teacher", replace(case, teachers=teachers)),
        ("student", replace(case, student=student)),
    ):
        got = run_loss(loss, poisoned)
        for part in ("loss", "grad_student", "grad_weights"):
            bad, good = getattr(got, part), getattr(clean, part)
            # Of the gradients to weights, a NaN teacher may leave those of the other teachers alone.
            reached = bad[row].isnan().any() if part == "grad_weights" else bad[row].isnan().all()
            assert reached, f"{part} of the row with a NaN {name} is not NaN"
            assert torch.equal(bad[others], good[others]), f"a NaN {name} changed {part} of other rows"


def assert_row_of_weight_zero_is_not_read(loss, case, row):
    """A row of weight zero may hold anything: it gives zero, no gradient, and changes no other row."""
    row_weight = torch.ones_like(case.student[:, 0])
    row_weight[row] = 0
    case = case.with_options(row_weight=row_weight)
    teachers, student = case.teachers.clone(), case.student.clone()
    teachers[:, row] = float("nan")
    student[row] = float("nan")
    clean, got = run_loss(loss, case), run_loss(loss, replace(case, teachers=teachers, student=student))
    for part in ("loss", "grad_student", "grad_weights"):
        value = getattr(got, part)
        assert (value[row] == 0).all(), f"{part} of a row of weight zero is not zero"
        assert torch.equal(value, getattr(clean, part)), f"{part} depends on a row of weight zero"


def _move(value, device):
    if isinstance(value, torch.Tensor | DenseRows):
        return value.to(device)
    if isinstance(value, MixedLabels):
        return MixedLabels(value.first.to(device), value.second.to(device), value.lam.to(device))
    if isinstance(value, dict):
        return {name: _move(each, device) for name, each in value.items()}
    if isinstance(value, list):
        return [_move(each, device) for each in value]
    return value


def _numpy(value):
    if isinstance(value, DenseRows):
        value = value.values
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.double().numpy() if value.dtype.is_floating_point else value.numpy()
    return value
