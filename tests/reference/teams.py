"""Methods of several teachers in float64 NumPy, written from the formulas: loops and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
from reference.methods import softmax


def min_norm(gram, largest):
    """Weights of smallest norm in the capped simplex: every choice of weights at a bound, the best kept."""
    count, best, least = len(gram), None, np.inf
    for states in itertools.product(("low", "high", "free"), repeat=count):
        free = [index for index, state in enumerate(states) if state == "free"]
        weights = np.array([largest if state == "high" else 0.0 for state in states])
        if free:
            system = np.ones((len(free) + 1, len(free) + 1))
            system[:-1, :-1], system[-1, -1] = gram[np.ix_(free, free)], 0.0
            known = np.append(-(gram @ weights)[free], 1 - weights.sum())
            weights[free] = np.linalg.lstsq(system, known, rcond=None)[0][:-1]
        inside = (weights > -1e-9).all() and (weights < largest + 1e-9).all()
        if inside and abs(weights.sum() - 1) < 1e-9 and weights @ gram @ weights < least:
            best, least = weights, weights @ gram @ weights
    return best


def logit_gradients(student, teachers, temperature):
    """Mean over samples of q - P_k, `(K, C)`."""
    found = np.zeros((len(teachers), student.shape[1]))
    for k, teacher in enumerate(teachers):
        for z, t in zip(student, teacher, strict=True):
            found[k] += (softmax(z, temperature) - softmax(t, temperature)) / len(student)
    return found


def order_loss(student, teachers, margin):
    """Of each anchor: mean over ordered pairs of others of the hinge on the majority's order."""
    rows = len(student)

    def distance(features, i, j):
        return np.sqrt(((features[i] - features[j]) ** 2).sum())

    losses = np.zeros(rows)
    for i in range(rows):
        for j, k in itertools.permutations([other for other in range(rows) if other != i], 2):
            votes = sum(np.sign(distance(t, i, j) - distance(t, i, k)) for t in teachers)
            if votes != 0:
                gap = np.sign(votes) * (distance(student, i, j) - distance(student, i, k))
                losses[i] += max(0.0, margin - gap)
        losses[i] /= (rows - 1) * (rows - 2)
    return losses


def cross_entropy(logits, label):
    """Of one row, nats."""
    return -np.log(softmax(logits)[label])


def confident_error(adapted, features, head_logits, labels):
    """`sum_k w_k mean (h_k - f_k)²` of each sample, `w_k = (1 - softmax_k CE_k) / (K - 1)`."""
    losses = np.zeros(len(labels))
    for n, label in enumerate(labels):
        share = softmax(np.array([cross_entropy(logits[n], label) for logits in head_logits]))
        for k, (mine, theirs) in enumerate(zip(adapted, features, strict=True)):
            losses[n] += (1 - share[k]) / (len(adapted) - 1) * ((mine[n] - theirs[n]) ** 2).mean()
    return losses


def discriminator_loss(layers, student, teacher, *, last_relu=False):
    """Mean over both halves and both outputs of the binary cross-entropy, `(N,)`."""

    def judged(logits, targets):
        for index, (weight, bias) in enumerate(layers):
            logits = weight @ logits + bias
            if index < len(layers) - 1 or last_relu:
                logits = np.maximum(logits, 0)
        signs = 2 * np.array(targets) - 1
        return np.log1p(np.exp(-signs * logits)).mean()

    return np.array(
        [(judged(z, (1, 0)) + judged(t, (0, 1))) / 2 for z, t in zip(student, teacher, strict=True)]
    )
