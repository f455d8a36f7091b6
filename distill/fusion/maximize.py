"""Maximization of many small functions at once, of a few unknowns each: Newton's method with a safe step."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TOLERANCE = 1e-6
"""Change of the logarithms of the unknowns in one step at which the CPU stops. Other devices take all steps,
since reading the change would wait for them."""
SLACK = 1e-12
"""Difference of values, relative to them, that may be of rounding."""
SMALLEST = 1e-37
"""Smallest number that is divided by, or whose logarithm is taken."""


class Problem(NamedTuple):
    """Function of theta `(N, K)` to maximize; adding a constant to a row of theta changes nothing."""

    value: Callable[[Tensor], Tensor]
    """Returns the values `(N,)`."""
    slopes: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Returns the gradient `(N, K)` and the negative Hessian `(N, K, K)`."""
    safe_step: Callable[[Tensor], Tensor]
    """Returns the next theta of a slower method that never lowers the value, and stays at its maximum."""


def maximize(problem: Problem, start: Tensor, iterations: int) -> Tensor:
    """Return theta `(N, K)` of some steps: in each row the best of Newton, safe and extrapolated."""
    theta = start
    for _ in range(iterations):
        once = problem.safe_step(theta)
        twice = problem.safe_step(once)
        new = _best(problem, twice, _extrapolated(theta, once, twice))
        new = _best(problem, new, theta + newton_step(*problem.slopes(theta)))
        new = torch.where(new.isfinite().all(1, keepdim=True), new - new.mean(1, keepdim=True), theta)
        moved, theta = _moved(theta, new), new
        if theta.device.type == "cpu" and bool((moved <= TOLERANCE).all()):
            break
    return theta


def _best(problem: Problem, one: Tensor, other: Tensor) -> Tensor:
    """Return the rows of higher value; of equal value but for rounding, those that a safe step moves less.

    Classes with low probabilities hardly change the value, but decide how a safe step moves.
    """
    gain, level = problem.value(other) - problem.value(one), problem.value(one).abs()
    calmer = _moved(other, problem.safe_step(other)) <= _moved(one, problem.safe_step(one))
    better = (gain > SLACK * level) | ((gain.abs() <= SLACK * level) & calmer)  # NaN is not
    return torch.where(better[:, None], other, one)


def _extrapolated(theta: Tensor, once: Tensor, twice: Tensor) -> Tensor:
    """Return the extrapolation of two steps (SQUAREM, Varadhan and Roland 2008, third step length)."""
    first, change = once - theta, twice - 2 * once + theta
    norms = [torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (first, change)]
    length = norms[0] / norms[1].clamp_min(SMALLEST)
    extrapolated: Tensor = theta + 2 * length * first + length.square() * change
    return extrapolated


def newton_step(gradient: Tensor, curvature: Tensor) -> Tensor:
    """Return the solution of curvature x = gradient, for a curvature of constants alone that is zero.

    Unknowns are scaled to curvature one; theirs may differ by orders of magnitude.
    """
    scale = curvature.diagonal(dim1=1, dim2=2).abs().clamp_min(SMALLEST).rsqrt()
    constant = torch.nn.functional.normalize(1 / scale, dim=1)
    scaled = scale[:, :, None] * curvature * scale[:, None, :]
    scaled = scaled + constant[:, :, None] * constant[:, None, :]
    solution: Tensor = torch.linalg.solve_ex(scaled, (scale * gradient)[..., None])[0][..., 0]
    return scale * solution


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Return the largest change `(N,)` of a row of theta, apart from a constant."""
    change = after - before
    return (change - change.mean(1, keepdim=True)).abs().amax(1)
