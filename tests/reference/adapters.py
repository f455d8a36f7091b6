"""Losses on features with adapters, in float64 NumPy, written from the formulas.

Loops over samples and values where the formula has an index; nothing is shared with the package.
"""

from __future__ import annotations

import math

import numpy as np


def convolution(maps, weight, bias, stride=1, padding=0):
    """`(N, C, H, W)` with `(O, C, k, l)`: sums over windows."""
    padded = np.pad(maps, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    _, _, high, wide = weight.shape
    rows = (padded.shape[2] - high) // stride + 1
    columns = (padded.shape[3] - wide) // stride + 1
    out = np.empty((len(maps), len(weight), rows, columns))
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride, column * stride
            window = padded[:, :, top : top + high, left : left + wide]
            out[:, :, row, column] = np.einsum("nchw,ochw->no", window, weight)
    return out if bias is None else out + bias[:, None, None]


def transposed_convolution(maps, weight, bias, stride, padding):
    """`(N, C, H, W)` with `(C, O, k, l)`: every value adds its share of the kernel."""
    count, _, height, width = maps.shape
    _, channels, high, wide = weight.shape
    out = np.zeros((count, channels, (height - 1) * stride + high, (width - 1) * stride + wide))
    for row in range(height):
        for column in range(width):
            top, left = row * stride, column * stride
            out[:, :, top : top + high, left : left + wide] += np.einsum(
                "nc,cohw->nohw", maps[:, :, row, column], weight
            )
    out = out[:, :, padding : out.shape[2] - padding, padding : out.shape[3] - padding]
    return out + bias[:, None, None]


def normalized(maps, weight, bias, eps=1e-5):
    """Batch normalization by the statistics of the batch."""
    mean = maps.mean((0, 2, 3), keepdims=True)
    variance = ((maps - mean) ** 2).mean((0, 2, 3), keepdims=True)
    return (maps - mean) / np.sqrt(variance + eps) * weight[:, None, None] + bias[:, None, None]


def gaussian_loss(mean, target, variance):
    """VID: mean over values of `1/2 ((mean - t)² / v_c + log v_c)`, `(N,)`."""
    losses = np.zeros(len(mean))
    for n, c in np.ndindex(*mean.shape[:2]):
        values = (mean[n, c] - target[n, c]) ** 2 / variance[c] + math.log(variance[c])
        losses[n] += 0.5 * values.sum()
    return losses / mean[0].size


def boundary_loss(student, teacher, margin):
    """AB: `(s + m)²` where s > -m and t <= 0, `(s - m)²` where s <= m and t > 0, summed, `(N,)`."""
    losses = np.zeros(len(student))
    for index in np.ndindex(*student.shape):
        s, t = student[index], teacher[index]
        if t <= 0 and s > -margin:
            losses[index[0]] += (s + margin) ** 2
        if t > 0 and s <= margin:
            losses[index[0]] += (s - margin) ** 2
    return losses


def partial_distance(student, teacher, margins):
    """OFD: `(s - t')²` unless s <= t' <= 0, with t' = max(t, m_c), summed, `(N,)`."""
    losses = np.zeros(len(student))
    for index in np.ndindex(*student.shape):
        target = max(teacher[index], margins[index[1]])
        if not student[index] <= target <= 0:
            losses[index[0]] += (student[index] - target) ** 2
    return losses


def factor_distance(student, teacher):
    """FT: mean over values of `|s / ||s|| - t / ||t|||`, `(N,)`."""
    losses = np.empty(len(student))
    for n, (s, t) in enumerate(zip(student, teacher, strict=True)):
        losses[n] = np.abs(s / np.sqrt((s**2).sum()) - t / np.sqrt((t**2).sum())).mean()
    return losses


def contrast(student, teacher, student_memory, teacher_memory, rows, temperature):
    """CRD of embeddings `(N, D)` in the first batch, `(N,)`: each network against the other's memory."""
    samples, negatives = len(student_memory), rows.shape[1] - 1
    share, losses = negatives / samples, np.zeros(len(student))
    for embedding, memory in ((student, teacher_memory), (teacher, student_memory)):
        scores = np.array(
            [
                [math.exp(embedding[n] @ memory[row] / temperature) for row in rows[n]]
                for n in range(len(rows))
            ]
        )
        scores /= scores.mean() * samples
        for n, (positive, *others) in enumerate(scores):
            losses[n] -= math.log(positive / (positive + share))
            losses[n] -= sum(math.log(share / (other + share)) for other in others)
    return losses


def remembered(memory, rows, embedding, momentum):
    """Rows of a memory moved towards embeddings, and scaled to unit length."""
    memory = memory.copy()
    for row, vector in zip(rows, embedding, strict=True):
        moved = momentum * memory[row] + (1 - momentum) * vector
        memory[row] = moved / np.sqrt((moved**2).sum())
    return memory
