"""The fused loss, the mixture and the teachers' facts in float64 NumPy, row by row from the formulas.

With q = softmax(z / T), P_k the softened and adjusted teacher k, p = sum_k w_k P_k and W = sum_k w_k:

    L        = row_weight (soft_weight T² D + hard_weight sum_j share_j (-log softmax(z)[label_j]))
    D        = sum_c p (log p - log q)                    "mixture";   sum_k w_k KL(P_k || q)   "sum"
    dL/dz    = row_weight (soft_weight T (W q - p) + hard_weight sum_j share_j (softmax(z) - onehot_j))
    dL/dw_k  = row_weight soft_weight T² times
               sum_c P_k (log p - log q) + 1              "mixture";   KL(P_k || q)             "sum"

For other divergences of a target t (the mixture, or each teacher) and x = z / T, with slopes to x and to t:

    reverse_kl   sum_c q (log q - log t)               q (log q - log t - D)                 -q / t
    js           1/2 sum_c t log(t/m) + q log(q/m)     1/2 q (log(q/m) - sum q log(q/m))     1/2 log(t/m)
    mse          1/C sum_c (x - t)², t of logits       2/C (x - t)                           -2/C (x - t)

0 log 0 = 0. In dL/dw_k log p is floored at `tiny`; there log p is constant, so such a class adds no 1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Answer:
    """Loss, gradients, and their magnitudes before cancellation: times a precision, bounds of the error."""

    loss: np.ndarray
    """`(N,)`, nats."""
    grad_student: np.ndarray
    """`(N, C)`."""
    grad_weights: np.ndarray
    """`(N, K)`, also where one `(K,)` serves all rows."""
    loss_size: np.ndarray
    """`(N,)`: 1 + T² sum_c p (|log p| + |log q|), and 1 + CE."""
    student_size: np.ndarray
    """`(N,)`: T (W max q + max p), and 1 for the cross-entropy."""
    weights_size: np.ndarray
    """`(N, K)`: T² (1 + sum_c P_k (|log p| + |log q|))."""


def log_softmax(logits, temperature=1.0):
    scaled = (logits - logits.max()) / temperature
    return scaled - np.log(np.exp(scaled).sum())


def log(values, floor=0.0):
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(values, floor))


def weighted_sum(probs, values):
    """`sum_c probs values`, where zero times infinity is zero."""
    there = probs > 0
    return float((probs[there] * values[there]).sum())


def teacher_probs(logits, label, temperature, adjustment, smoothing):
    """Softened and adjusted probabilities `(C,)` of one teacher; `label` None leaves them unadjusted."""
    probs = np.exp(log_softmax(logits, temperature))
    if adjustment == "none" or label is None or logits[label] == logits.max():
        return probs
    if adjustment == "smooth":
        return (1 - smoothing) * (np.arange(len(logits)) == label) + smoothing / len(logits)
    assert adjustment == "shift"
    top = int(np.argmax(logits))
    probs[[label, top]] = probs[[top, label]]
    return probs


def soft_part(logits, probs, weights, temperature, combine, floor):
    """Loss, both gradients and their sizes of one row; `probs` are `(K, C)`."""
    log_q = log_softmax(logits, temperature)
    p = weights @ probs
    squared = temperature**2
    with np.errstate(invalid="ignore"):  # log p and log q may both be -inf, where p is zero
        if combine == "mixture":
            divergence = weighted_sum(p, log(p) - log_q)
            size = weighted_sum(p, np.abs(log(p)) + np.abs(log_q))
            slopes = log(p, floor) - log_q + (p >= floor)
            sizes = np.abs(log(p, floor)) + np.abs(log_q)
            grad_weights = np.array([weighted_sum(each, slopes) for each in probs])
            weights_size = 1 + np.array([weighted_sum(each, sizes) for each in probs])
        else:
            assert combine == "sum"
            grad_weights = np.array([weighted_sum(each, log(each) - log_q) for each in probs])
            sizes = np.array([weighted_sum(each, np.abs(log(each)) + np.abs(log_q)) for each in probs])
            divergence, size = weighted_sum(weights, grad_weights), weighted_sum(weights, sizes)
            weights_size = 1 + sizes
    q = np.exp(log_q)
    grad_student = temperature * (weights.sum() * q - p)
    student_size = temperature * (weights.sum() * q.max() + p.max())
    return Answer(
        squared * divergence,
        grad_student,
        squared * grad_weights,
        1 + squared * size,
        student_size,
        squared * weights_size,
    )


def compare(divergence, scaled, target, floor):
    """D, its slopes to the logits over T and to the target, and the sizes of D and of the first slope."""
    if divergence == "mse":
        difference = scaled - target
        sizes = np.abs(scaled) + np.abs(target)
        slope = 2 * difference / len(target)
        return (difference**2).mean(), slope, -slope, (sizes**2).mean(), 2 * sizes.max() / len(target)
    log_q, log_t = log_softmax(scaled), log(target, floor)
    q = np.exp(log_q)
    if divergence == "reverse_kl":
        ratio = np.where(q > 0, log_q - log_t, 0)
        value = weighted_sum(q, ratio)
        target_slope = np.where(target >= floor, -q / np.maximum(target, floor), 0)
        size = weighted_sum(q, np.abs(log_q) + np.abs(log_t))
        return value, q * (ratio - value), target_slope, size, size
    assert divergence == "js"
    log_m = log((target + q) / 2, floor)
    of_t, of_q = log_t - log_m, log(q, floor) - log_m
    value = (weighted_sum(target, of_t) + weighted_sum(q, of_q)) / 2
    size = weighted_sum(target, np.abs(log_t) + np.abs(log_m)) + weighted_sum(
        q, np.abs(log_q) + np.abs(log_m)
    )
    return value, q * (of_q - weighted_sum(q, of_q)) / 2, of_t / 2, size, size


def other_soft_part(divergence, logits, targets, weights, temperature, combine, floor):
    """`soft_part` for the other divergences; `targets` are `(K, C)` probabilities or logits over T."""
    squared, scaled = temperature**2, logits / temperature
    if combine == "mixture":
        value, slope, target_slope, size, slope_size = compare(divergence, scaled, weights @ targets, floor)
        grad_weights = np.array([weighted_sum(np.abs(t), np.sign(t) * target_slope) for t in targets])
        weights_size = np.array([weighted_sum(np.abs(t), np.abs(target_slope) + 1) for t in targets])
    else:
        each = [compare(divergence, scaled, t, floor) for t in targets]
        value, slope, size, slope_size = (
            sum(w * one[i] for w, one in zip(weights, each, strict=True)) for i in (0, 1, 3, 4)
        )
        grad_weights = np.array([one[0] for one in each])
        weights_size = np.array([one[3] for one in each])
    return Answer(
        squared * value,
        temperature * slope,
        squared * grad_weights,
        1 + squared * size,
        temperature * (1 + slope_size),
        squared * (1 + weights_size + size),
    )


def hard_part(logits, targets):
    """Cross-entropy of one row to `[(label, share), ...]`, its gradient and its size."""
    log_r = log_softmax(logits)
    value, gradient = 0.0, np.zeros_like(logits)
    for label, share in targets:
        if share > 0:
            value -= share * log_r[label]
            gradient += share * (np.exp(log_r) - (np.arange(len(logits)) == label))
    return value, gradient, 1 + value


def expand_temperatures(temperature, teacher_temperature, count, rows):
    """`(N,)` and `(K, N)`."""
    own = np.broadcast_to(np.asarray(temperature, dtype=np.float64), rows)
    if teacher_temperature is None:
        return own, np.broadcast_to(own, (count, rows))
    given = np.asarray(teacher_temperature, dtype=np.float64).reshape(count, -1)
    return own, np.broadcast_to(given, (count, rows))


def targets_of_row(labels, n, ignore_index):
    """`[(label, share), ...]` of row n without what is to be ignored."""
    if labels is None:
        return []
    if isinstance(labels, tuple):
        first, second, lam = labels
        both = [(int(first[n]), float(lam[n])), (int(second[n]), 1 - float(lam[n]))]
    else:
        both = [(int(labels[n]), 1.0)]
    return [(label, share) for label, share in both if label != ignore_index]


def row_targets(divergence, teachers, labels, n, temperatures, adjustment, smoothing, ignore_index):
    """What row n is compared with, `(K, C)`: probabilities, or for "mse" logits over their temperatures."""
    if divergence != "mse":
        return row_probs(teachers, labels, n, temperatures, adjustment, smoothing, ignore_index)
    names = [adjustment] * len(teachers) if isinstance(adjustment, str) else adjustment
    hard = [] if isinstance(labels, tuple) else targets_of_row(labels, n, ignore_index)
    targets = teachers[:, n] / temperatures[:, n, None]
    for k, name in enumerate(names):
        if name == "shift" and hard:
            label, top = hard[0][0], int(np.argmax(teachers[k, n]))
            if teachers[k, n, label] < teachers[k, n, top]:
                targets[k, [label, top]] = targets[k, [top, label]]
    return targets


def row_probs(teachers, labels, n, temperatures, adjustment, smoothing, ignore_index):
    """Softened and adjusted probabilities `(K, C)` of row n."""
    count = len(teachers)
    names = [adjustment] * count if isinstance(adjustment, str) else adjustment
    hard = [] if isinstance(labels, tuple) else targets_of_row(labels, n, ignore_index)
    label = hard[0][0] if hard else None
    return np.stack(
        [teacher_probs(teachers[k, n], label, temperatures[k, n], names[k], smoothing) for k in range(count)]
    )


def soft_target_loss(
    student_logits,
    teachers,
    labels=None,
    *,
    weights=None,
    temperature=1.0,
    teacher_temperature=None,
    adjustment="none",
    smoothing=0.1,
    divergence="kl",
    combine="mixture",
    soft_weight=1.0,
    hard_weight=0.0,
    row_weight=None,
    ignore_index=-100,
    tiny=TINY,
):
    """Loss and gradients of logits `(N, C)` against teachers `(K, N, C)`.

    `labels` is None, `(N,)`, or a tuple (first, second, lam) for mixed labels.
    """
    count, rows, classes = teachers.shape
    weights = np.full(count, 1 / count) if weights is None else weights
    weights = np.broadcast_to(weights, (rows, count))
    own, theirs = expand_temperatures(temperature, teacher_temperature, count, rows)
    answer = Answer(
        *(np.zeros(shape) for shape in [rows, (rows, classes), (rows, count), rows, rows, (rows, count)])
    )
    for n in range(rows):
        scale = 1.0 if row_weight is None else float(row_weight[n])
        if scale == 0:
            continue
        if soft_weight != 0:
            facts = (teachers, labels, n, theirs, adjustment, smoothing, ignore_index)
            targets = row_targets(divergence, *facts)
            if divergence == "kl":
                soft = soft_part(student_logits[n], targets, weights[n], own[n], combine, tiny)
            else:
                rest = (targets, weights[n], own[n], combine, tiny)
                soft = other_soft_part(divergence, student_logits[n], *rest)
            for field in fields(Answer):
                factor = scale * soft_weight
                factor = abs(factor) if field.name.endswith("size") else factor
                getattr(answer, field.name)[n] += factor * getattr(soft, field.name)
        if hard_weight != 0:
            value, gradient, size = hard_part(student_logits[n], targets_of_row(labels, n, ignore_index))
            answer.loss[n] += scale * hard_weight * value
            answer.grad_student[n] += scale * hard_weight * gradient
            answer.loss_size[n] += abs(scale * hard_weight) * size
            answer.student_size[n] += abs(scale * hard_weight)
    return answer


def soft_targets(
    teachers,
    labels=None,
    *,
    weights=None,
    temperature=1.0,
    teacher_temperature=None,
    adjustment="none",
    smoothing=0.1,
    ignore_index=-100,
):
    """The mixture `sum_k w_k P_k`, `(N, C)`, and its parts P_k, `(N, K, C)`."""
    count, rows, _ = teachers.shape
    weights = np.full(count, 1 / count) if weights is None else weights
    weights = np.broadcast_to(weights, (rows, count))
    _, theirs = expand_temperatures(temperature, teacher_temperature, count, rows)
    probs = np.stack(
        [row_probs(teachers, labels, n, theirs, adjustment, smoothing, ignore_index) for n in range(rows)]
    )
    return np.stack([weights[n] @ probs[n] for n in range(rows)]), probs


def teacher_stats(logits, label=None, other=None):
    """Facts about one teacher's logits `(C,)` of one sample; `label` None stands for an ignored one."""
    log_probs = log_softmax(logits)
    facts = {
        "argmax": int(np.argmax(logits)),
        "entropy": -weighted_sum(np.exp(log_probs), log_probs),
        "norm": float(np.sqrt((logits**2).sum())),
        "correct": label is not None and bool(logits[label] == logits.max()),
        "cross_entropy": 0.0 if label is None else float(-log_probs[label]),
    }
    if other is not None:
        facts["cosine"] = float(logits @ other / (np.sqrt((logits**2).sum()) * np.sqrt((other**2).sum())))
    return facts
