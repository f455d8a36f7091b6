"""The fused loss with its gradient derived by hand, in torch operations on any device.

For `divergence="kl"`; the others are in `coursepack.kernels.divergences`.

With q = softmax(z / T), P_k the softened and adjusted teachers, p = sum_k w_k P_k and W = sum_k w_k:

    dL/dz   = soft_weight T (W q - p) + hard_weight (softmax(z) - onehot)
    dL/dw_k = soft_weight T² (sum_c P_kc (log p_c - log q_c) + 1)        combine="mixture"
            = soft_weight T² KL(P_k || q)                                combine="sum"

The divergence of the normalised mixture is summed as `p (d + expm1(-d))`, d = log p - log q: equal to
`p log(p/q)` because both sides sum to one, and free of its cancellation when T is large or both are sure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coursepack.kernels import divergences, reference

if TYPE_CHECKING:
    from coursepack.kernels.arguments import Arguments


def evaluate(
    student_logits: Tensor, weights: Tensor, arguments: Arguments, wants_student: bool, wants_weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss `(N,)` and the gradients of its sum to logits `(N, C)` and weights `(N, K)`, or None."""
    with torch.autocast(student_logits.device.type, enabled=False):
        return _evaluate(student_logits, weights, arguments, wants_student, wants_weights)


def _evaluate(
    student_logits: Tensor, weights: Tensor, a: Arguments, wants_student: bool, wants_weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    logits = student_logits.to(a.dtype)
    total = torch.zeros_like(logits[:, 0])
    grad_student = torch.zeros_like(logits) if wants_student else None
    grad_weights = None
    if a.soft_weight != 0:
        soft, grad_student, grad_weights = _soft(logits, weights, a, wants_student, wants_weights)
        total = total + soft
    elif wants_weights:
        grad_weights = torch.zeros_like(weights, dtype=a.dtype)
    if a.hard_weight != 0 and a.labels is not None:
        total = total + a.hard_weight * reference.cross_entropy(logits, a.labels)
        if grad_student is not None:
            _add_cross_entropy_gradient(grad_student, logits, a)
    total = _per_row(total, a)
    if grad_student is not None:
        grad_student = _per_row(grad_student, a).to(student_logits.dtype)
    if grad_weights is not None:
        grad_weights = _per_row(grad_weights, a).to(weights.dtype)
    return total, grad_student, grad_weights


def _soft(
    logits: Tensor, weights: Tensor, a: Arguments, wants_student: bool, wants_weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if a.divergence != "kl":
        return divergences.soft(logits, weights, a, wants_weights)
    temperature = a.temperature[:, None]
    log_q = (logits - logits.amax(1, keepdim=True)).div_(temperature)
    q = log_q.exp()
    total = q.sum(1, keepdim=True)
    q.div_(total)
    log_q.sub_(total.log_())
    weight_sum = weights.double().sum(1, keepdim=True)
    kept = []
    if a.combine == "mixture":
        share = torch.where(weight_sum > 0, weights.double() / weight_sum, weights * 0).to(a.dtype)
        mixture = torch.zeros_like(q)
        for k in range(len(a.teachers)):
            probs = reference.teacher_probs(a, k)
            mixture.addcmul_(probs, share[:, k, None])
            if wants_weights:
                kept.append(probs)
        log_ratio = _log(mixture).sub_(log_q)
        divergence = weight_sum[:, 0] * _divergence(mixture, q, log_ratio) + _x_log_x(weight_sum[:, 0])
        mixture.mul_(weight_sum)
        grad_weights = _mixture_weight_gradient(kept, mixture, log_q, a) if kept else None
    else:
        weights = weights.to(a.dtype)
        mixture = torch.zeros_like(q)
        divergence = torch.zeros_like(weight_sum[:, 0])
        for k in range(len(a.teachers)):
            probs = reference.teacher_probs(a, k)
            each = _divergence(probs, q, _log(probs).sub_(log_q))
            divergence = divergence + torch.where(weights[:, k] == 0, weights[:, k], weights[:, k] * each)
            mixture.addcmul_(probs, weights[:, k, None])
            kept.append(each)
        scale = a.soft_weight * a.temperature**2
        grad_weights = scale[:, None] * torch.stack(kept, dim=1) if wants_weights else None
    loss = (a.soft_weight * a.temperature.double() ** 2 * divergence).to(a.dtype)
    grad_student = None
    if wants_student:
        grad_student = q.mul_(weight_sum).sub_(mixture).mul_(a.soft_weight * temperature)
    return loss, grad_student, grad_weights


def _divergence(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """KL(p || q) per row, float64, of normalised rows, `log_ratio` = log p - log q; no term is negative."""
    near = p * (log_ratio + torch.expm1(-log_ratio))
    far = p * log_ratio + (q - p)
    terms = torch.where(log_ratio > -1, near, far)
    return torch.where(p == 0, q, terms).sum(1).double()


def _mixture_weight_gradient(probs: list[Tensor], mixture: Tensor, log_q: Tensor, a: Arguments) -> Tensor:
    """`T² (sum_c P_kc (log p_c - log q_c) + 1)` per teacher, `(N, K)`; no 1 where log p is floored."""
    slope = _log(mixture).sub_(log_q).add_(mixture >= torch.finfo(mixture.dtype).tiny)
    columns = [torch.where(p == 0, p, p * slope).sum(1) for p in probs]
    return (a.soft_weight * a.temperature**2)[:, None] * torch.stack(columns, dim=1)


def _add_cross_entropy_gradient(gradient: Tensor, logits: Tensor, a: Arguments) -> None:
    if a.labels is None:
        return
    parts = a.labels.parts()
    share_sum = sum(torch.where(valid, share, 0) for _, valid, share in parts)
    assert isinstance(share_sum, Tensor)
    gradient.addcmul_(reference.softmax(logits), (a.hard_weight * share_sum)[:, None].to(a.dtype))
    for label, valid, share in parts:
        taken = torch.where(valid, -a.hard_weight * share, 0).to(a.dtype)
        gradient.scatter_add_(1, label[:, None], taken[:, None])


def _per_row(value: Tensor, a: Arguments) -> Tensor:
    """Scale rows by their weight; a row of weight zero is zero whatever it held, a bad row is NaN."""
    trailing = (slice(None),) + (None,) * (value.ndim - 1)
    if a.bad_rows is not None:
        value = value.masked_fill(a.bad_rows[trailing], float("nan"))
    if a.row_weight is None:
        return value
    weight = a.row_weight[trailing]
    return torch.where(weight == 0, 0, weight * value)


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log_()


def _x_log_x(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0, x * x.log())
