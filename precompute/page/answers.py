"""Answers of teachers to single samples: their most probable classes, and where several disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from coursepack.data.store.manifest import LOGITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data.store import StoreReader

ROWS_AT_A_TIME = 8192
"""Rows of logits that are decoded together."""


@dataclass(frozen=True)
class Answer:
    """Most probable classes of one sample according to one teacher."""

    classes: tuple[int, ...]
    probs: tuple[float, ...]


def answers(reader: StoreReader, view: int, samples: NDArray[np.int64], count: int) -> list[Answer]:
    """Return the `count` most probable classes of each sample in a view, the first being the top class."""
    probs = reader.rows(LOGITS, view, samples).decode().softmax(dim=1)
    top = probs.topk(min(count, probs.shape[1]), dim=1)
    known = reader.manifest.known_classes
    return [
        Answer(tuple(known[column] for column in columns), tuple(values))
        for columns, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Disagreement:
    """Disagreement of several teachers about every sample of a view."""

    divergence: NDArray[np.float64]
    """Jensen-Shannon divergence of the teachers' probs at temperature 1, `(N,)` in nats: the mean over
    teachers of KL(teacher || mean of all teachers), at most log K (Lin 1991, section V)."""
    same_class: NDArray[np.bool_]
    """True where all teachers have the same top class, `(N,)`."""


def disagreement(readers: Sequence[StoreReader], view: int) -> Disagreement:
    """Compare the teachers' outputs for all samples of a view."""
    divergences, same = [], []
    total = readers[0].manifest.samples
    for start in range(0, total, ROWS_AT_A_TIME):
        samples = np.arange(start, min(start + ROWS_AT_A_TIME, total))
        probs = torch.stack([_probs(reader, view, samples) for reader in readers])
        entropy = torch.special.entr(probs).sum(2).mean(0)
        mixed = torch.special.entr(probs.mean(0)).sum(1)
        divergences.append((mixed - entropy).clamp(min=0.0).numpy())
        top = probs.argmax(2)
        same.append((top == top[0]).all(0).numpy())
    return Disagreement(np.concatenate(divergences), np.concatenate(same))


def _probs(reader: StoreReader, view: int, samples: NDArray[np.int64]) -> Tensor:
    """Return probs `(N, C)` float64, zero for classes that the teacher does not know."""
    known = reader.rows(LOGITS, view, samples).decode().double().softmax(dim=1)
    probs = known.new_zeros(len(samples), len(reader.manifest.class_names))
    probs[:, list(reader.manifest.known_classes)] = known
    return probs
