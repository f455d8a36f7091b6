"""Losses on logits beyond the divergences of `loss`, in float64 NumPy, row by row from the formulas.

Losses are per sample `(N,)`, of the student's logits `(N, C)` and the teacher's probabilities `(N, C)`.
"""

from __future__ import annotations

import numpy as np
from reference.methods import kl, softmax


def mixture(teachers, weights, temperature):
    """`sum_k w_nk softmax(z_kn / T)`, `(N, C)`; teachers `(K, N, C)`, weights `(N, K)`."""
    count, rows, _ = teachers.shape
    return np.array(
        [sum(weights[n, k] * softmax(teachers[k, n], temperature) for k in range(count)) for n in range(rows)]
    )


def standardized(logits):
    """Rows minus their mean over their deviation with C - 1, and 1e-7 added to it."""
    return np.array(
        [
            (row - row.mean()) / (np.sqrt(((row - row.mean()) ** 2).sum() / (len(row) - 1)) + 1e-7)
            for row in logits
        ]
    )


def dkd(student, teacher_probs, labels, temperature, alpha, beta):
    """`T² (alpha TCKD + beta NCKD)`."""
    values = []
    for z, p, y in zip(student, teacher_probs, labels, strict=True):
        q = softmax(z, temperature)
        target = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        others = kl(np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y]))
        values.append(temperature**2 * (alpha * target + beta * others))
    return np.array(values)


def dist(student, teacher_probs, temperature, beta, gamma):
    """`T² (beta (1 - corr of each row) + gamma mean of (1 - corr of each column))`."""
    probs = np.array([softmax(row, temperature) for row in student])
    inter = np.array([1 - _correlation(q, p) for q, p in zip(probs, teacher_probs, strict=True)])
    intra = np.mean([1 - _correlation(q, p) for q, p in zip(probs.T, teacher_probs.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


def _correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / (np.sqrt(a @ a) * np.sqrt(b @ b) + 1e-8)


def virtual_teacher(student, labels, confidence, temperature, softening):
    """KL from a teacher of `confidence` on the label, softened as the paper or as the release does."""
    classes, values = student.shape[1], []
    for z, y in zip(student, labels, strict=True):
        probs = np.full(classes, (1 - confidence) / (classes - 1))
        probs[y] = confidence
        if softening == "both":
            values.append(kl(softmax(np.log(probs), temperature), softmax(z, temperature)))
        else:
            values.append(kl(softmax(probs, temperature), softmax(z)))
    return np.array(values)


def confident_label(student, teacher_probs, labels):
    """`N w_n CE_n / sum of w`, w the teacher's largest probability."""
    weights = np.array([max(row) for row in teacher_probs])
    losses = np.array([-np.log(softmax(z, 1.0)[y]) for z, y in zip(student, labels, strict=True)])
    return len(losses) * weights * losses / weights.sum()


def divergence(student, teacher_probs, temperature):
    """`T² KL` of each row."""
    return np.array(
        [temperature**2 * kl(p, softmax(z, temperature)) for z, p in zip(student, teacher_probs, strict=True)]
    )
