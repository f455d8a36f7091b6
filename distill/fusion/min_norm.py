"""Min-norm fusion of AE-KD: weights per batch under which the teachers' gradients disagree least.

The teachers' losses are the objectives of a multi-objective problem, and the convex combination of their
gradients with the smallest norm is a common descent direction (Désidéri 2012). AE-KD takes gradients at the
student's logits, where they have a closed form: no backward pass is needed. The quadratic program for K
teachers is solved exactly on the CPU. The release solves it by a support vector machine with an absolute
tolerance of 1e-6, which returns its starting point if gradients are small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.distill.losses.base import Needs
from coursepack.distill.losses.relation import student_embedding
from coursepack.distill.schedule import value_at
from coursepack.kernels import soft_targets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coursepack.distill.fusion.base import Weigh
    from coursepack.distill.losses.base import BuildContext, LossInputs

RIDGE = 1e-10
"""Ridge, relative to the mean diagonal of the Gram matrix, which makes the solution unique: teachers with
equal gradients share their weight equally."""
SLACK = 1e-9
"""Difference of slopes, relative to the largest, up to which a solution is optimal."""


class MinNormConfig(FusionConfig):
    """Config of the min-norm fusion."""

    name: Literal["min_norm"] = "min_norm"
    tolerance: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Largest weight of one teacher, C in the paper; raised to 1/K if it is smaller. At 1/K all weights are
    equal, and at 1 one teacher can take all weight."""


def logit_gradients(inputs: LossInputs, temperature: float) -> Tensor:
    """Return the gradient `(K, C)` of each teacher's loss, averaged over the batch, in units of T.

    The gradient of T² KL(P_k || q) at the student's logits is T (q - P_k). It is detached.
    """
    with torch.no_grad():
        student_probs = student_embedding(inputs.student.logits, "probs", temperature)
        return torch.stack(
            [
                (student_probs - soft_targets([logits], temperature=temperature)).mean(0)
                for logits in inputs.teachers.logits
            ]
        )


def min_norm_weights(gram: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """Return the weights `a` `(K,)` that minimize a' G a, with sum(a) = 1 and 0 <= a <= `largest`.

    An active-set method: weights at a bound are held, the others are solved for. A pair of weights is
    released while moving weight from one to the other lowers the norm. Without a finite matrix, weights are
    NaN.

    Args:
        gram: Gram matrix G of the gradients `(K, K)`.
        largest: upper bound of a weight, at least 1/K.
    """
    count = len(gram)
    if not np.isfinite(gram).all():
        return np.full(count, np.nan)
    matrix = gram + RIDGE * (np.trace(gram) / count or 1.0) * np.eye(count)
    weights = np.full(count, 1 / count)
    free = np.full(count, largest * count > 1)
    for _ in range(100 * count):
        if free.any():
            goal = weights.copy()
            goal[free] = _stationary(matrix, weights, free)
            blocking = _advance(weights, goal, largest)
            if blocking is not None:
                free[blocking] = False
                continue
        slopes = matrix @ weights
        down = int(np.argmax(np.where(weights > 0, slopes, -np.inf)))
        up = int(np.argmin(np.where(weights < largest, slopes, np.inf)))
        if slopes[down] - slopes[up] <= SLACK * np.abs(slopes).max():
            break
        free[[down, up]] = True
    return weights


def _stationary(
    matrix: NDArray[np.float64], weights: NDArray[np.float64], free: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the free weights that minimize the norm while the others are held, ignoring bounds."""
    count = int(free.sum())
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = matrix[np.ix_(free, free)]
    system[count, count] = 0.0
    held = np.where(free, 0.0, weights)
    known = np.append(-(matrix @ held)[free], 1 - held.sum())
    solution: NDArray[np.float64] = np.linalg.solve(system, known)[:count]
    return solution


def _advance(weights: NDArray[np.float64], goal: NDArray[np.float64], largest: float) -> int | None:
    """Move weights towards a goal in place, up to the first bound; return the index of the weight there."""
    step = goal - weights
    room = np.where(step < 0, weights, largest - weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(step != 0, room / np.abs(step), np.inf)
    index = int(np.argmin(shares))
    if shares[index] >= 1:
        weights[:] = goal
        return None
    weights += shares[index] * step
    weights[index] = 0.0 if step[index] < 0 else largest
    return index


def _build(config: MinNormConfig, context: BuildContext) -> Weigh:
    def weigh(inputs: LossInputs) -> Tensor:
        """Return weights `(K,)` without gradient."""
        temperature = value_at(context.temperature, inputs.step.epoch)
        gradients = logit_gradients(inputs, temperature).double().cpu().numpy()
        largest = max(config.tolerance, 1 / len(gradients))
        weights = min_norm_weights(gradients @ gradients.T, largest)
        return torch.from_numpy(weights).to(inputs.student.logits.device, torch.float32)

    return weigh


MIN_NORM = Fusion(
    config=MinNormConfig,
    formula="w = argmin |sum_k w_k mean_x (q - P_k)|², sum_k w_k = 1, 0 <= w_k <= max(C, 1/K)",
    source="Du et al. 2020 (AE-KD), NeurIPS 2020",
    combine="sum",
    build=_build,
    needs=lambda _config: Needs(whole_batch=("fusion 'min_norm'",)),
)
