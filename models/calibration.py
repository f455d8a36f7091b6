"""Expected calibration error of a network's answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

BINS = 15
"""Number of equal-width bins of the calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3)."""


class Calibration:
    """Expected calibration error, accumulated over batches."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(BINS, 3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: logits `(N, C)`, labels `(N,)`."""
        confidence, top = logits.detach().float().softmax(1).max(1)
        index = (confidence * BINS).long().clamp(0, BINS - 1)
        counts = torch.stack([torch.ones_like(confidence), confidence, (top == labels).float()], dim=1)
        self.sums.index_add_(0, index, counts.double())

    def error(self) -> float:
        """Return the mean over samples of |confidence - accuracy| of their bins."""
        count, confidence, correct = self.sums.T
        return float((confidence - correct).abs().sum() / count.sum().clamp_min(1))
