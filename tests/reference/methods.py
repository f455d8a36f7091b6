"""Fusions, dynamic temperatures, relations and calibration in float64 NumPy, written from the formulas.

Loops over samples, triples and teachers where the formula has an index; nothing is shared with the package.
"""

from __future__ import annotations

import itertools

import numpy as np


def softmax(logits, temperature=1.0):
    """Of one row `(C,)`."""
    exponentials = np.exp((logits - logits.max()) / temperature)
    return exponentials / exponentials.sum()


def kl(p, q):
    """KL(p || q) of two rows, nats."""
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def confidence_weights(teachers, labels):
    """`(1 - softmax_k(CE_k)) / (K - 1)`, `(N, K)`; teachers `(K, N, C)`."""
    count, rows, _ = teachers.shape
    weights = np.empty((rows, count))
    for n in range(rows):
        losses = np.array([-np.log(softmax(teachers[k, n])[labels[n]]) for k in range(count)])
        weights[n] = (1 - softmax(losses)) / (count - 1)
    return weights


def entropy_weights(teachers):
    """`(1 - H_k / sum H) / (K - 1)`, `(N, K)`."""
    count, rows, _ = teachers.shape
    weights = np.empty((rows, count))
    for n in range(rows):
        entropies = np.array([-sum(p * np.log(p) for p in softmax(teachers[k, n])) for k in range(count)])
        weights[n] = (1 - entropies / entropies.sum()) / (count - 1)
    return weights


def adaptive_weights(representation, latents, shared):
    """`softmax_k(v . (theta_k * beta_n))`, `(N, K)`."""
    scores = np.array([[(shared * theta * beta).sum() for theta in latents] for beta in representation])
    return np.array([softmax(row) for row in scores])


def shifted(logits, label):
    """One row with the entries of the label and of its top class swapped."""
    swapped = logits.copy()
    top = int(np.argmax(logits))
    swapped[label], swapped[top] = logits[top], logits[label]
    return swapped


def flsw_temperatures(student, teacher, base, slope, gamma, lowest=0.0, highest=np.inf):
    """`T_0 + slope (mean omega - omega)`, omega = (1 - cos)^gamma with 1e-4 added to each norm."""
    omega = np.array(
        [
            (1 - (s / (np.sqrt((s**2).sum()) + 1e-4)) @ (t / (np.sqrt((t**2).sum()) + 1e-4))) ** gamma
            for s, t in zip(student, teacher, strict=True)
        ]
    )
    return np.clip(base + slope * (omega.mean() - omega), lowest, highest)


def cwsm_temperatures(student, base, slope, lowest=0.0, highest=np.inf):
    """`T_0 + slope (mean omega - omega)`, omega = 1 / (max softmax + 1e-3)."""
    omega = np.array([1 / (softmax(row).max() + 1e-3) for row in student])
    return np.clip(base + slope * (omega.mean() - omega), lowest, highest)


def smooth_l1(difference):
    """Huber loss with delta 1."""
    size = abs(difference)
    return 0.5 * size**2 if size < 1 else size - 0.5


def _direction(vector):
    length = np.sqrt((vector**2).sum())
    return vector / length if length > 0 else vector


def angle_loss(student, teacher):
    """Mean over all triples (i, j, k) of SmoothL1 between the cosines of the angles at j."""
    rows = len(student)
    total = 0.0
    for i, j, k in itertools.product(range(rows), repeat=3):
        cosines = [_direction(e[i] - e[j]) @ _direction(e[k] - e[j]) for e in (student, teacher)]
        total += smooth_l1(cosines[0] - cosines[1])
    return total / rows**3


def distance_loss(student, teacher):
    """Mean over all pairs of SmoothL1 between distances over their mean over pairs i != j, zeros included."""

    def distances(embedding):
        table = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in embedding] for a in embedding])
        return table / table[~np.eye(len(table), dtype=bool)].mean()

    theirs, ours = distances(teacher), distances(student)
    return np.mean([smooth_l1(a - b) for a, b in zip(ours.ravel(), theirs.ravel(), strict=True)])


def calibration_error(probs, labels, bins=15):
    """Mean over samples of |mean confidence - accuracy| of their bin of confidence."""
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    total = 0.0
    for place in range(bins):
        inside = (confidence >= place / bins) & (confidence < (place + 1) / bins)
        if place == bins - 1:
            inside |= confidence >= 1
        if inside.any():
            total += inside.sum() * abs(confidence[inside].mean() - correct[inside].mean())
    return total / len(labels)


def numeric_gradient(function, point, step=1e-6):
    """Central differences of a scalar function at a float64 array."""
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        moved = point.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


def numeric_gradient_of_mean(function, point, step=1e-6):
    """Central differences, in all rows at once, of the mean of values `(N,)` that each depend on one row."""
    gradient = np.zeros_like(point)
    for column in range(point.shape[1]):
        moved = step * (np.arange(point.shape[1]) == column)
        gradient[:, column] = (function(point + moved) - function(point - moved)) / (2 * step * len(point))
    return gradient
