"""Unification of teachers that know different classes, in float64 by general optimizers over all classes.

A teacher is its probabilities by class, `{class: probability}`.
"""

from __future__ import annotations

import numpy as np
from reference.methods import softmax
from scipy.optimize import least_squares, minimize


def cross_entropy(teachers, classes):
    """The softmax of the scores with the least sum of cross-entropies within each teacher's classes."""

    def loss(scores):
        value, slope = 0.0, np.zeros(classes)
        for probs in teachers:
            known = list(probs)
            given, own = np.array(list(probs.values())), softmax(scores[known])
            value -= given @ np.log(own)
            slope[known] += own - given
        return value, slope

    found = minimize(loss, np.zeros(classes), jac=True, method="BFGS", options={"gtol": 1e-11})
    return softmax(found.x)


def factorization(teachers, classes):
    """The normalized u of the least squared error of `v_k u` on each teacher's classes, u and v positive."""

    def errors(logs):
        u, v = np.exp(logs[:classes]), np.exp(logs[classes:])
        found = [probs[c] - v[k] * u[c] for k, probs in enumerate(teachers) for c in probs]
        return np.array([*found, logs[classes:].mean()])  # of all scales of v, the one of mean 1

    start = np.zeros(classes + len(teachers))
    for probs in teachers:
        start[list(probs)] = np.log(list(probs.values()))
    found = least_squares(errors, start, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    return softmax(found.x[:classes])


def mean(teachers, classes):
    """The normalized mean over the teachers that know a class."""
    means = np.array([np.mean([probs[c] for probs in teachers if c in probs]) for c in range(classes)])
    return means / means.sum()
