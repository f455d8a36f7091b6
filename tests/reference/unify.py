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


def logit_factorization(teachers, classes, ridge=0.01):
    """The softmax of the u of the least squared error of `v_k u + c_k` to the log of teachers' probabilities.

    `ridge` pulls v to 1, and u to the one of least error with v = 1, of mean zero; v is not negative. u is
    then multiplied by the number that brings it nearest to that one.
    """
    count = len(teachers)
    cells = [(k, c, np.log(probs[c])) for k, probs in enumerate(teachers) for c in probs]
    of_teacher, of_class, logits = (np.array(each) for each in zip(*cells, strict=True))
    design = np.eye(classes)[of_class], np.eye(count)[of_teacher]
    center = np.linalg.lstsq(np.hstack(design), logits, rcond=None)[0][:classes]
    center -= center.mean()
    weight = np.sqrt(ridge * (center @ center) / count)

    def errors(factors):
        u, v, c = np.split(factors, [classes, classes + count])
        found = logits - v[of_teacher] * u[of_class] - c[of_teacher]
        return np.concatenate([found, np.sqrt(ridge) * (u - center), weight * (v - 1)])

    start = np.concatenate([center, np.ones(count), np.zeros(count)])
    least = np.repeat([-np.inf, 0.0, -np.inf], [classes, count, count])
    found = least_squares(errors, start, bounds=(least, np.inf), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    u = found.x[:classes]
    return softmax(u * (u @ center) / (u @ u))


def mean(teachers, classes):
    """The normalized mean over the teachers that know a class."""
    means = np.array([np.mean([probs[c] for probs in teachers if c in probs]) for c in range(classes)])
    return means / means.sum()
