"""Divergences other than KL(teachers || student), in torch operations for any device.

On the CPU, `cpu.jit_divergences` computes the same.

With x = z / T, q = softmax(x), and as target t either the mixture sum_k w_k X_k or each teacher's X_k, where
X_k are its softened and adjusted probabilities P_k, or for "mse" its logits over its temperature:

    reverse_kl   D = sum_c q (log q - log t)                                    MiniLLM, Gu et al. 2023
    js           D = 1/2 sum_c t log(t / m) + q log(q / m), m = (t + q) / 2     Lin 1991
    mse          D = 1/C sum_c (x - t)²                                         Ba and Caruana 2014, eq. 1

Gradients are derived by hand: dD/dz = (dD/dx) / T, dD/dw_k = sum_c X_k dD/dt for the mixture and D of teacher
k for the sum. Logarithms of a target are clamped at the smallest normal number, so that a class with teacher
probability 0 has a large but finite cost; dD/dt of "reverse_kl" is 0 there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coursepack.kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.kernels.values import LossValues

Compared = tuple[Tensor, Tensor, Tensor]
"""D `(N,)`, dD/dx `(N, C)` and dD/dt `(N, C)`."""


def soft(
    logits: Tensor, weights: Tensor, values: LossValues, wants_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute `soft_weight T² D` per row `(N,)` and its gradients to logits `(N, C)` and weights `(N, K)`."""
    compare = COMPARISONS[values.spec.divergence]
    scaled = logits / values.temperature[:, None]
    weights = weights.to(values.dtype)
    columns: list[Tensor] = []
    if values.spec.combine == "mixture":
        mixture, targets = torch.zeros_like(scaled), []
        for k in range(len(values.teachers)):
            each = reference.target(values, k)
            mixture.addcmul_(each, weights[:, k, None])
            targets += [each] if wants_weights else []
        divergence, slope, target_slope = compare(scaled, mixture)
        if wants_weights:
            columns = [torch.where(each == 0, each, each * target_slope).sum(1) for each in targets]
    else:
        divergence, slope = torch.zeros_like(scaled[:, 0]), torch.zeros_like(scaled)
        for k in range(len(values.teachers)):
            one, its_slope, _ = compare(scaled, reference.target(values, k))
            divergence = divergence + weights[:, k] * one
            slope.addcmul_(its_slope, weights[:, k, None])
            columns.append(one)
    factor = values.spec.soft_weight * values.temperature
    squared = factor * values.temperature
    grad_weights = squared[:, None] * torch.stack(columns, dim=1) if wants_weights else None
    return squared * divergence, slope.mul_(factor[:, None]), grad_weights


def _reverse_kl(scaled: Tensor, t: Tensor) -> Compared:
    log_q = reference.log_softmax(scaled)
    q, tiny = log_q.exp(), torch.finfo(t.dtype).tiny
    ratio = torch.where(q == 0, 0, log_q - t.clamp_min(tiny).log_())
    divergence = (q * ratio).sum(1)
    return divergence, q * (ratio - divergence[:, None]), torch.where(t >= tiny, -q / t, 0)


def _js(scaled: Tensor, t: Tensor) -> Compared:
    q = reference.softmax(scaled)
    tiny = torch.finfo(t.dtype).tiny
    log_m = ((t + q) / 2).clamp_min(tiny).log_()
    of_t, of_q = (each.clamp_min(tiny).log_().sub_(log_m) for each in (t, q))
    divergence = (t * of_t + q * of_q).sum(1) / 2
    slope = q * (of_q - (q * of_q).sum(1, keepdim=True)) / 2
    return divergence, slope, of_t / 2


def _mse(scaled: Tensor, t: Tensor) -> Compared:
    difference = scaled - t
    slope = difference * (2 / t.shape[1])
    return difference.square().mean(1), slope, -slope


COMPARISONS: dict[str, Callable[[Tensor, Tensor], Compared]] = {
    "reverse_kl": _reverse_kl,
    "js": _js,
    "mse": _mse,
}
