"""Plain definition of the fused loss: slow, short, differentiable by autograd.

Every path that computes this loss agrees with this module. It takes arguments that
`coursepack.kernels.values` has checked and expanded. Formulas: Hinton et al. 2015 (soft targets and
T²); Wen et al. 2019, arXiv 1911.07471, section 3 (knowledge adjustment: label smoothing and probability
shift); Liu et al. 2020, arXiv 2103.04062 (the mixture of softened teachers with weights per sample).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from coursepack.kernels.values import HardLabels, LossValues


def loss(student_logits: Tensor, weights: Tensor, values: LossValues) -> Tensor:
    """Compute the loss per row `(N,)` in nats, differentiable in logits `(N, C)` and weights `(N, K)`."""
    student_logits = student_logits.to(values.dtype)
    made = [target(values, k) for k in range(len(values.teachers))]
    probs = torch.stack(made, dim=1)
    if values.row_weight is not None:
        unread = values.row_weight == 0
        student_logits = student_logits.masked_fill(unread[:, None], 0)
        probs = probs.masked_fill(unread[:, None, None], 0)
    weights = weights.to(values.dtype)
    scaled = student_logits / values.temperature[:, None]
    if values.spec.combine == "mixture":
        divergence = compare(values.spec.divergence, scaled, (weights[:, :, None] * probs).sum(1))
    else:
        divergence = (weights * compare(values.spec.divergence, scaled[:, None], probs)).sum(1)
    total = values.spec.soft_weight * values.temperature**2 * divergence
    if values.spec.hard_weight != 0 and values.labels is not None:
        total = total + values.spec.hard_weight * cross_entropy(student_logits, values.labels)
    if values.bad_rows is not None:
        total = total * torch.where(values.bad_rows, float("nan"), 1.0)
    if values.row_weight is not None:
        total = torch.where(values.row_weight == 0, 0, values.row_weight * total)
    return total


def compare(divergence: str, scaled: Tensor, target: Tensor) -> Tensor:
    """Compute D over the last dimension from a target and the student's logits divided by T."""
    if divergence == "mse":
        return (scaled - target).square().mean(-1)
    log_q = log_softmax(scaled)
    if divergence == "kl":
        return _times_log_ratio(target, log_q).sum(-1)
    log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()
    q = log_q.exp()
    if divergence == "reverse_kl":
        return (q * torch.where(q == 0, 0, log_q - log_target)).sum(-1)
    log_m = ((target + q) / 2).clamp_min(torch.finfo(target.dtype).tiny).log()
    return (_times_log_ratio(target, log_m) + _times_log_ratio(q, log_m)).sum(-1) / 2


def adjusted_logits(values: LossValues, index: int) -> Tensor:
    """Logits `(N, C)` of one teacher, after the adjustment "shift" if it has one."""
    logits = values.teacher_logits(index)
    if values.adjustments[index] != "shift" or values.labels is None:
        return logits
    return _shifted(logits, values.labels.first, values.labels.first_valid)


def shift_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Swap the logits of the label and of the top class in every row where the label is not on top.

    KA-PS on logits instead of probabilities (Wen et al. 2019, arXiv 1911.07471, section 3.1), which gives the
    same probabilities at every temperature. Ties of the top go to the lowest class.

    Args:
        logits: `(N, C)`.
        labels: class ids `(N,)` int64; a row with a negative one stays as it is.
    """
    return _shifted(logits, labels.clamp_min(0), labels >= 0)


def _shifted(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    label, top = labels[:, None], logits.argmax(1, keepdim=True)
    at_label, at_top = logits.gather(1, label), logits.gather(1, top)
    swapped = logits.scatter(1, label, at_top).scatter(1, top, at_label)
    wrong = (at_label < logits.amax(1, keepdim=True)) & valid[:, None]
    return torch.where(wrong, swapped, logits)


def target(values: LossValues, index: int) -> Tensor:
    """Target `(N, C)` of one teacher: probabilities, or for "mse" its logits divided by its temperature."""
    if values.spec.divergence == "mse":
        return adjusted_logits(values, index) / values.teacher_temperatures[index][:, None]
    return teacher_probs(values, index)


def teacher_probs(values: LossValues, index: int) -> Tensor:
    """Softened and adjusted probabilities `(N, C)` of one teacher."""
    logits = adjusted_logits(values, index)
    probs = softmax(logits, values.teacher_temperatures[index][:, None])
    if values.adjustments[index] != "smooth" or values.labels is None:
        return probs
    label = values.labels.first[:, None]
    wrong = (logits.gather(1, label) < logits.amax(1, keepdim=True)) & values.labels.first_valid[:, None]
    classes = logits.shape[1]
    smooth = torch.full_like(logits, values.spec.smoothing / classes)
    smooth.scatter_add_(1, label, torch.full_like(label, 1, dtype=values.dtype) * (1 - values.spec.smoothing))
    return torch.where(wrong, smooth, probs)


def cross_entropy(student_logits: Tensor, labels: HardLabels) -> Tensor:
    """Cross-entropy `(N,)` to hard or mixed labels; an ignored label adds nothing."""
    return picked_entropy(log_softmax(student_logits), labels)


def picked_entropy(log_probs: Tensor, labels: HardLabels) -> Tensor:
    """Cross-entropy `(N,)` from the student's log-probabilities, as `cross_entropy`."""
    total = None
    for label, valid, share in labels.parts():
        picked = log_probs.gather(1, label[:, None])[:, 0]
        if share is None:
            return torch.where(valid, 0 - picked, 0)
        part = torch.where(valid & (share != 0), share * picked, 0)
        total = 0 - part if total is None else total - part
    assert total is not None
    return total


def softmax(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Softmax of each row of `logits / temperature`.

    `torch.softmax` adds the terms of a row sequentially: with 21841 classes in float32 on a CPU its error
    reaches 7e-6 of the largest probability, and 5e-7 with `sum`.
    """
    scaled = _centered(logits) / temperature
    exponentials = scaled.exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def log_softmax(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Logarithm of `softmax`."""
    scaled = _centered(logits) / temperature
    return scaled - scaled.exp().sum(-1, keepdim=True).log()


def _centered(logits: Tensor) -> Tensor:
    """Subtract each row's maximum before any division."""
    return logits - logits.detach().amax(-1, keepdim=True)


def _times_log_ratio(p: Tensor, log_q: Tensor) -> Tensor:
    """`p (log p - log q)`, with `0 log 0 = 0`; log p is clamped at the smallest normal number."""
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    masked_by_both = (p.detach() == 0) & torch.isneginf(log_q.detach())
    return p * (log_p - log_q.masked_fill(masked_by_both, 0))
