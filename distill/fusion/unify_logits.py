"""Unified distribution by factorization of the teachers' logits into one row of logits, scales and shifts.

Teacher k is taken to have the logits v_k u + c_k of the classes that it knows. As the re-implementation of
Vongkulbhisal et al. 2019 (arXiv 1904.06062) has it, u, v and c minimize the squared error and a ridge that
pulls u and v to zero. The error is the same for a u and v / a, so that such a ridge alone decides the scale
of u, and with it how sure softmax(u) is; nor does it give back what teachers with few common classes agree
on. Here the ridge pulls v to one, and u to the best u for v = 1, and u is then multiplied by the number that
brings it nearest to that one. Teachers that agree are given back exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from coursepack.distill.fusion.maximize import SLACK, TOLERANCE

if TYPE_CHECKING:
    from torch import Tensor

    from coursepack.distill.fusion.class_sets import ClassSets

DAMPINGS = (0.3, 0.03, 0.0)
"""Multiples of the curvature for fixed u and c that are added to that of Newton's method."""
SMALLEST = 1e-30
"""Smallest squared length of u, and weight of the distance of v from one, of rows without differences."""


class Problem(NamedTuple):
    """Function of v to minimize, with the best u and c for each v."""

    known: Tensor
    """One for the classes that each teacher knows, else zero, `(K, C)`."""
    logits: Tensor
    """Logits with mean zero in each teacher, zero for unknown classes, `(N, K, C)`."""
    center: Tensor
    """The best u for v = 1, with mean zero, `(N, C)`."""
    weight: Tensor
    """Weight `(N, 1)` of the squared distance of v from one beside that of u from `center`: 1/K of the square
    of `center`, so that multiplying all logits multiplies the whole function."""
    ridge: float
    """Weight of both beside the squared error."""


class Factors(NamedTuple):
    """Scales of the teachers, and the best u and c for them."""

    v: Tensor
    """Scales `(N, K)`, not negative."""
    u: Tensor
    """Logits `(N, C)`."""
    errors: Tensor
    """Logits minus `v_k u + c_k`, zero for unknown classes, `(N, K, C)`."""
    value: Tensor
    """Value of the function `(N,)`."""


def logit_factorization(sets: ClassSets, log_probs: Tensor, iterations: int, ridge: float) -> Tensor:
    """Return u `(N, C)`, the logits of the unified distribution, never longer than the best u for v = 1.

    A step takes, row by row, the best of v in closed form for the u at hand, which never makes the value
    worse, and three damped steps of Newton's method. Logits multiplied by a number give u multiplied by it:
    from log-probs at a temperature, u is that of the teachers' logits divided by the temperature.

    Args:
        sets: classes that each teacher knows.
        log_probs: log-probs `(K, N, C)`, minus infinity for the classes that a teacher does not know.
        iterations: maximum number of steps.
        ridge: weight of the squared distance of v from one, and of u from that for v = 1.
    """
    problem = _problem(sets, log_probs, ridge)
    found = _best_factors(problem, torch.ones_like(problem.logits[:, :, 0]))
    rounding = SLACK * problem.logits.square().sum((1, 2))
    for _ in range(iterations):
        old, best = found, _best_factors(problem, _best_scales(problem, found))
        for v in _newton_steps(problem, old):
            new = _best_factors(problem, v)
            better = new.value <= best.value + rounding  # NaN is not
            best = Factors(*(_where(better, *pair) for pair in zip(new, best, strict=True)))
        found = best
        if found.v.device.type == "cpu" and bool(((found.v - old.v).abs() <= TOLERANCE).all()):
            break
    nearest = (found.u * problem.center).sum(1, keepdim=True)
    return found.u * (nearest / found.u.square().sum(1, keepdim=True).clamp_min(SMALLEST))


def _where(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (one.ndim - 1)), one, other)


def _problem(sets: ClassSets, log_probs: Tensor, ridge: float) -> Problem:
    members = sets.all_members[sets.group].T
    known, counts = members.to(log_probs.dtype), members.sum(1)
    logits = log_probs.transpose(0, 1).where(members, 0.0)
    logits = logits - known * (logits.sum(2) / counts)[:, :, None]
    # For v = 1, the classes in common decide c but for a constant; here its mean is zero.
    shares = known / known.sum(0)
    links = torch.diag(known.sum(1)) - shares @ known.T + 1 / len(known)
    right = -torch.einsum("kc,nc->kn", shares, logits.sum(1))
    shifts = torch.linalg.solve_ex(links, right)[0].T[:, :, None]
    center = (shares * (logits - shifts)).sum(1)
    center = center - center.mean(1, keepdim=True)
    weight = center.square().sum(1, keepdim=True) / len(known)
    return Problem(known, logits, center, weight.clamp_min(SMALLEST), ridge)


def _best_factors(problem: Problem, v: Tensor) -> Factors:
    """Return the factors with the best u and c for v."""
    known, logits, center, weight, ridge = problem
    scales, below = _scales(problem, v)
    above = ridge * center + (scales * logits).sum(1)
    right = -(scales * (above[:, None, :] / below)).sum(2)
    shifts = torch.linalg.solve_ex(_curvature_of_shifts(problem, scales, below), right[..., None])[0]
    u = (above - (scales * shifts).sum(1)) / below[:, 0]
    errors = known * (logits - shifts) - scales * u[:, None, :]
    distance = (u - center).square().sum(1) + weight[:, 0] * (v - 1).square().sum(1)
    return Factors(v, u, errors, errors.square().sum((1, 2)) + ridge * distance)


def _scales(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return v at known classes, else zero, `(N, K, C)`, and half the curvature in u `(N, 1, C)`."""
    scales = problem.known * v[:, :, None]
    return scales, (problem.ridge + scales.square().sum(1))[:, None, :]


def _curvature_of_shifts(problem: Problem, scales: Tensor, below: Tensor) -> Tensor:
    """Return half the Hessian in c, without u, `(N, K, K)`."""
    return torch.diag(problem.known.sum(1)) - (scales / below) @ scales.transpose(1, 2)


def _best_scales(problem: Problem, found: Factors) -> Tensor:
    """Return the best v for u, with the best c for both, `(N, K)`."""
    known, logits, _, weight, ridge = problem
    u = known * found.u[:, None, :]
    u = u - known * (u.sum(2) / known.sum(1))[:, :, None]
    above, below = (u * logits).sum(2) + ridge * weight, u.square().sum(2) + ridge * weight
    return (above / below).clamp_min(0)


def _newton_steps(problem: Problem, found: Factors) -> list[Tensor]:
    """Return v `(N, K)` after a step of Newton's method in v alone, without u and c, for each damping."""
    u, v = problem.known * found.u[:, None, :], found.v
    scales, below = _scales(problem, v)
    alone = u.square().sum(2) + problem.ridge * problem.weight
    mixed = scales * u - found.errors  # half the mixed derivatives in v and u
    with_shifts = torch.diag_embed(u.sum(2)) - (mixed / below) @ scales.transpose(1, 2)
    of_shifts = _curvature_of_shifts(problem, scales, below)
    curvature = torch.diag_embed(alone) - (mixed / below) @ mixed.transpose(1, 2)
    curvature = curvature - with_shifts @ torch.linalg.solve_ex(of_shifts, with_shifts.transpose(1, 2))[0]
    gradient = problem.ridge * problem.weight * (v - 1) - (u * found.errors).sum(2)
    free = (v > 0) | (gradient <= 0)  # a scale of zero that would become negative stays
    curvature = curvature * (free[:, :, None] & free[:, None, :])
    steps = []
    for damping in DAMPINGS:
        damped = curvature + torch.diag_embed(alone * (damping + (~free).to(v.dtype)))
        step = torch.linalg.solve_ex(damped, (gradient * free)[..., None])[0][..., 0]
        steps.append((v - step).clamp_min(0))
    return steps
