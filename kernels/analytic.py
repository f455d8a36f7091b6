"""The fused loss and its hand-derived gradient in torch operations, for any device.

This module covers `divergence="kl"`; `coursepack.kernels.divergences` has the others. Tensors are written in
place where possible, nothing waits for the device, and a CUDA graph can capture the calls.

With q = softmax(z / T), P_k the softened and adjusted teachers, p = sum_k w_k P_k and W = sum_k w_k:

    dL/dz   = soft_weight T (W q - p) + hard_weight (softmax(z) - onehot)
    dL/dw_k = soft_weight T² (sum_c P_kc (log p_c - log q_c) + 1)        combine="mixture"
            = soft_weight T² KL(P_k || q)                                combine="sum"

The divergence of the normalized mixture is the sum of `p (d + expm1(-d))`, d = log p - log q. It equals the
sum of `p log(p/q)` because p and q both sum to one, but does not cancel when T is large or p and q are close.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coursepack.kernels import divergences, reference

if TYPE_CHECKING:
    from coursepack.kernels.values import LossValues

Evaluated = tuple[Tensor, Tensor | None, Tensor | None]
"""Loss and its gradients with respect to the student's logits and the weights."""


def evaluate(
    values: LossValues,
    student_logits: Tensor,
    weights: Tensor | None,
    wants_student: bool,
    wants_weights: bool,
) -> Evaluated:
    """Compute the loss `(N,)` and the gradients of its sum with respect to logits and weights.

    Args:
        values: the checked call.
        student_logits: `(N, C)`.
        weights: `(N, K)`; None means 1/K.
        wants_student: compute the gradient `(N, C)` with respect to the logits, otherwise None.
        wants_weights: compute the gradient `(N, K)` with respect to the weights, otherwise None.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        return _evaluate(values, student_logits, weights, wants_student, wants_weights)


def _evaluate(
    values: LossValues,
    student_logits: Tensor,
    weights: Tensor | None,
    wants_student: bool,
    wants_weights: bool,
) -> Evaluated:
    logits = student_logits.to(values.dtype)
    total = grad_student = grad_weights = None
    if values.spec.soft_weight != 0:
        total, grad_student, grad_weights = _soft(logits, weights, values, wants_student, wants_weights)
    elif weights is not None and wants_weights:
        grad_weights = torch.zeros_like(weights, dtype=values.dtype)
    if grad_student is None and wants_student:
        grad_student = torch.zeros_like(logits)
    if values.spec.hard_weight != 0 and values.labels is not None:
        hard = _hard(logits, grad_student, values)
        total = hard if total is None else total.add_(hard)
    if total is None:
        total = torch.zeros_like(logits[:, 0])
    _scale_rows([each for each in (total, grad_student, grad_weights) if each is not None], values)
    if grad_student is not None:
        grad_student = grad_student.to(student_logits.dtype)
    if grad_weights is not None and weights is not None:
        grad_weights = grad_weights.to(weights.dtype)
    return total, grad_student, grad_weights


def _soft(
    logits: Tensor, weights: Tensor | None, values: LossValues, wants_student: bool, wants_weights: bool
) -> Evaluated:
    if values.spec.divergence != "kl":
        return divergences.soft(logits, expanded(weights, values), values, wants_weights)
    temperature = values.temperature[:, None]
    log_q = (logits - logits.amax(1, keepdim=True)).div_(temperature)
    q = log_q.exp()
    total = q.sum(1, keepdim=True)
    q.div_(total)
    log_q.sub_(total.log_())
    if values.spec.combine == "mixture":
        divergence, mixture, weight_sum, grad_weights = _of_mixture(q, log_q, weights, values, wants_weights)
    else:
        divergence, mixture, weight_sum, grad_weights = _of_each(q, log_q, expanded(weights, values), values)
    loss = (values.spec.soft_weight * values.temperature.double() ** 2 * divergence).to(values.dtype)
    grad_student = None
    if wants_student:
        if not _is_one(weight_sum):
            q.mul_(weight_sum)
        grad_student = q.sub_(mixture).mul_(values.spec.soft_weight * temperature)
    return loss, grad_student, grad_weights if wants_weights else None


def expanded(weights: Tensor | None, values: LossValues) -> Tensor:
    """Return the weights `(N, K)`; 1/K in float64 if None was given."""
    if weights is not None:
        return weights
    (rows,), count, device = values.temperature.shape, len(values.teachers), values.temperature.device
    return torch.full((1, 1), 1 / count, dtype=torch.float64, device=device).expand(rows, count)


Soft = tuple[Tensor, Tensor, Tensor | float, Tensor | None]
"""D `(N,)` float64, sum_k w_k P_k `(N, C)`, W `(N, 1)` or a number, and dL/dw `(N, K)` or None."""


def _of_mixture(
    q: Tensor, log_q: Tensor, weights: Tensor | None, values: LossValues, wants_weights: bool
) -> Soft:
    weight_sum, shares = _shares(weights, values)
    kept = [_teacher_probs(values, 0)]
    mixture = kept[0]
    if shares is not None:
        # In place unless the gradient to the weights reads the teacher's probabilities once more.
        mixture = mixture * shares[:, :1] if wants_weights else mixture.mul_(shares[:, :1])
        for k in range(1, len(values.teachers)):
            probs = _teacher_probs(values, k)
            mixture.addcmul_(probs, shares[:, k, None])
            if wants_weights:
                kept.append(probs)
    log_ratio = _log(mixture).sub_(log_q)
    divergence = _divergence(mixture, q, log_ratio)
    if isinstance(weight_sum, Tensor):
        divergence = divergence.mul_(weight_sum[:, 0]).add_(_x_log_x(weight_sum[:, 0]))
    elif not _is_one(weight_sum):
        divergence = divergence.mul_(weight_sum).add_(weight_sum * math.log(weight_sum))
    if not _is_one(weight_sum):
        mixture = mixture.mul_(weight_sum)
    grad_weights = _mixture_weight_gradient(kept, mixture, log_q, values) if wants_weights else None
    return divergence, mixture, weight_sum, grad_weights


def _of_each(q: Tensor, log_q: Tensor, weights: Tensor, values: LossValues) -> Soft:
    weight_sum = weights.double().sum(1, keepdim=True)
    weights = weights.to(values.dtype)
    unread = weights == 0
    columns = []
    mixture = divergence = None
    for k in range(len(values.teachers)):
        probs = _teacher_probs(values, k)
        each = _divergence(probs, q, _log(probs).sub_(log_q))
        columns.append(each)
        part = (weights[:, k] * each).masked_fill_(unread[:, k], 0)
        divergence = part if divergence is None else divergence.add_(part)
        weight = weights[:, k, None]
        mixture = probs.mul_(weight) if mixture is None else mixture.addcmul_(probs, weight)
    assert mixture is not None
    assert divergence is not None
    scale = values.spec.soft_weight * values.temperature**2
    return divergence, mixture, weight_sum, scale[:, None] * torch.stack(columns, dim=1)


def _shares(weights: Tensor | None, values: LossValues) -> tuple[Tensor | float, Tensor | None]:
    """Return W and the weights divided by W `(N or 1, K)`, or None for one teacher of weight one."""
    count = len(values.teachers)
    if weights is None:
        weight_sum = sum([1 / count] * count)
        if count == 1:
            return weight_sum, None
        share = torch.full(
            (1, 1), 1 / count / weight_sum, dtype=values.dtype, device=values.temperature.device
        )
        return weight_sum, share.expand(1, count)
    double = weights.double()
    total = double.sum(1, keepdim=True)
    return total, torch.where(total > 0, double / total, weights * 0).to(values.dtype)


def _is_one(weight_sum: Tensor | float) -> bool:
    return not isinstance(weight_sum, Tensor) and weight_sum == 1


def _teacher_probs(values: LossValues, index: int) -> Tensor:
    """Compute `reference.teacher_probs` in a new buffer that the caller may overwrite."""
    if values.adjustments[index] == "smooth" and values.labels is not None:
        return reference.teacher_probs(values, index)
    logits = reference.adjusted_logits(values, index)
    probs = (logits - logits.amax(1, keepdim=True)).div_(values.teacher_temperatures[index][:, None]).exp_()
    return probs.div_(probs.sum(1, keepdim=True))


def _divergence(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """KL(p || q) per row in float64, from normalized rows and `log_ratio` = log p - log q."""
    near = torch.expm1(-log_ratio).add_(log_ratio).mul_(p)
    far = (q - p).add_(p * log_ratio)
    terms = torch.where(log_ratio > -1, near, far)
    return torch.where(p == 0, q, terms).sum(1).double()


def _mixture_weight_gradient(
    probs: list[Tensor], mixture: Tensor, log_q: Tensor, values: LossValues
) -> Tensor:
    """`T² (sum_c P_kc (log p_c - log q_c) + 1)` `(N, K)`, without the 1 where log p is clamped."""
    slope = _log(mixture).sub_(log_q).add_(mixture >= torch.finfo(mixture.dtype).tiny)
    columns = [torch.where(p == 0, p, p * slope).sum(1) for p in probs]
    return (values.spec.soft_weight * values.temperature**2)[:, None] * torch.stack(columns, dim=1)


def _hard(logits: Tensor, gradient: Tensor | None, values: LossValues) -> Tensor:
    """Compute `hard_weight` times the cross-entropy `(N,)` and add its gradient to `gradient`."""
    assert values.labels is not None
    log_probs = logits - logits.amax(1, keepdim=True)
    exponentials = log_probs.exp()
    total = exponentials.sum(1, keepdim=True)
    loss = reference.picked_entropy(log_probs.sub_(total.log()), values.labels).mul_(values.spec.hard_weight)
    if gradient is None:
        return loss
    factors = [values.spec.hard_weight * values.labels.counted(part) for part in values.labels.parts()]
    both = factors[0] if len(factors) == 1 else factors[0] + factors[1]
    gradient.addcmul_(exponentials.div_(total), both[:, None])
    for (label, _, _), factor in zip(values.labels.parts(), factors, strict=True):
        gradient.scatter_add_(1, label[:, None], factor.neg_()[:, None])
    return loss


def _scale_rows(results: list[Tensor], values: LossValues) -> None:
    """Multiply rows in place by their weight. Rows of weight zero become zero, bad rows NaN."""
    if values.bad_rows is None and values.row_weight is None:
        return
    unread = None if values.row_weight is None else values.row_weight == 0
    for value in results:
        column = (slice(None),) + (None,) * (value.ndim - 1)
        if values.bad_rows is not None:
            value.masked_fill_(values.bad_rows[column], float("nan"))
        if values.row_weight is not None and unread is not None:
            value.mul_(values.row_weight[column]).masked_fill_(unread[column], 0)


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log_()


def _x_log_x(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0, x * x.log())
