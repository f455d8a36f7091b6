"""Teacher of `scaling.py`, which the workers of the cluster import by name."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

SLEEP = 0.05
"""Seconds of a forward pass."""


class Sleeping(nn.Module):
    """Network that sleeps and returns prepared logits."""

    preprocessing: ClassVar[dict[str, Any]] = {"size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}

    def __init__(self, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(classes, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(SLEEP)
        return self.logits.expand(len(images), -1)
