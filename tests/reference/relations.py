"""Losses between relations of features in float64 NumPy, written from the formulas with a loop per index.

Maps are `(N, C, H, W)`, embeddings `(N, D)`. Nothing is shared with the package.
"""

from __future__ import annotations

import itertools
import math

import numpy as np


def tiles(maps, size):
    """Maps averaged over equal tiles, `size` along each side."""
    rows, channels, height, width = maps.shape
    return maps.reshape(rows, channels, size, height // size, size, width // size).mean((3, 5))


def attention(maps):
    """One row of unit length per sample, `(N, H W)`."""
    rows, channels, height, width = maps.shape
    found = np.zeros((rows, height * width))
    for n, c, y, x in itertools.product(range(rows), range(channels), range(height), range(width)):
        found[n, y * width + x] += maps[n, c, y, x] ** 2
    return np.array([row / math.sqrt((row**2).sum()) for row in found])


def at(student, teacher):
    """Mean over samples and positions of squared differences."""
    return ((attention(student) - attention(teacher)) ** 2).mean()


def at_norm(student, teacher):
    """Mean over samples of the norm of the difference (equation 2 of the paper, without its factor)."""
    gaps = attention(student) - attention(teacher)
    return np.mean([math.sqrt((gap**2).sum()) for gap in gaps])


def nst(student, teacher):
    """Maximum mean discrepancy of unit channels with the kernel `(x . y)²`, over all pairs of channels."""

    def mean_kernel(left, right):
        return np.mean([[(a @ b) ** 2 for b in right] for a in left])

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        ours, theirs = ([c.ravel() / math.sqrt((c**2).sum()) for c in maps] for maps in (s, t))
        total += mean_kernel(theirs, theirs) + mean_kernel(ours, ours) - 2 * mean_kernel(ours, theirs)
    return total / len(student)


def flow(first, second):
    """`(N, C1, C2)`: mean over positions of products of channels."""
    rows, positions = len(first), first.shape[2] * first.shape[3]
    found = np.zeros((rows, first.shape[1], second.shape[1]))
    for n, i, j in itertools.product(range(rows), range(first.shape[1]), range(second.shape[1])):
        found[n, i, j] = (first[n, i] * second[n, j]).sum() / positions
    return found


def fsp(student, teacher):
    """Mean squared difference of flows; each side is a pair of maps."""
    return ((flow(*student) - flow(*teacher)) ** 2).mean()


def sp(student, teacher):
    """`||G_s - G_t||² / N²`, each row of G of unit length."""

    def similarities(features):
        flat = [sample.ravel() for sample in features]
        table = np.array([[a @ b for b in flat] for a in flat])
        return np.array([row / math.sqrt((row**2).sum()) for row in table])

    return ((similarities(student) - similarities(teacher)) ** 2).sum() / len(student) ** 2


def cosines(embedding):
    """`(N, N)`."""
    return np.array(
        [[a @ b / math.sqrt((a @ a) * (b @ b)) for b in embedding] for a in embedding],
    )


def pkt(student, teacher, eps=1e-7):
    """Mean over all pairs of `p log((p + eps) / (q + eps))`."""

    def probabilities(embedding):
        return np.array([row / row.sum() for row in (1 + cosines(embedding)) / 2])

    q, p = probabilities(student), probabilities(teacher)
    rows = len(student)
    return (
        sum(p[i, j] * math.log((p[i, j] + eps) / (q[i, j] + eps)) for i in range(rows) for j in range(rows))
        / rows**2
    )


def cc(student, teacher, gamma=0.4, order=2):
    """Mean over all pairs of squared differences of a truncated Gaussian kernel."""

    def kernel(cosine):
        return sum(
            math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)
        )

    return ((kernel(cosines(student)) - kernel(cosines(teacher))) ** 2).mean()
