"""Sequential and monitored teaching in float64 NumPy, written from their rules."""

from __future__ import annotations

import numpy as np
from reference.methods import softmax


def cross_entropy(logits, label):
    """-log softmax(logits)[label] of one row, at T = 1."""
    return -np.log(softmax(logits)[label])


def sequence_weights(phases, epoch):
    """Weights `(K,)` of an epoch: one for the teacher whose phase it is; zeros after the last phase."""
    weights, first = np.zeros(len(phases)), 0
    for k, length in enumerate(phases):
        if first <= epoch < first + length:
            weights[k] = 1
        first += length
    return weights


def equal_phases(teachers, epochs):
    """Lengths of equal phases, rounded so that each ends at the last whole epoch of its share."""
    ends = [int(np.floor(epochs * (k + 1) / teachers)) for k in range(teachers)]
    return np.diff([0, *ends])


def monitored_weights(student, teachers, labels, rule):
    """Weights `(N, K)`; student `(N, C)`, teachers `(K, N, C)`, labels `(N,)` or `(first, second, share)`."""
    count, rows, _ = teachers.shape
    weights = np.zeros((rows, count))
    for n in range(rows):

        def loss(logits, n=n):
            if not isinstance(labels, tuple):
                return cross_entropy(logits, labels[n])
            first, second, share = (part[n] for part in labels)
            return share * cross_entropy(logits, first) + (1 - share) * cross_entropy(logits, second)

        for k in range(count):
            if rule == "right":
                weights[n, k] = teachers[k, n].argmax() == labels[n]
            else:
                weights[n, k] = loss(teachers[k, n]) < loss(student[n])
        if weights[n].any():
            weights[n] /= weights[n].sum()
    return weights


def linear(start, end, epochs, epoch):
    """A number that goes from start to end in a straight line, and stays there."""
    return start + (end - start) * min(epoch / epochs, 1)


def annealed_error(student, teacher, highest, epochs, epoch):
    """mean_c (z - Phi z_t)² per sample, Phi = 1 - (T - 1) / T_max, T one lower in every block of epochs."""
    temperature = highest
    for block in range(1, highest):
        if epoch >= block * epochs / highest:
            temperature = highest - block
    scale = 1 - (temperature - 1) / highest
    return ((student - scale * teacher) ** 2).mean(1)
