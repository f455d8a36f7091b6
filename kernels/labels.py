"""Labels of mixed images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MixedLabels:
    """Two labels per row and the share of the first, as mixup and cutmix produce them.

    Cross-entropy to them is `lam * CE(first) + (1 - lam) * CE(second)`.
    """

    first: Tensor
    """Class ids of the first image, `(N,)` int64."""
    second: Tensor
    """Class ids of the second image, `(N,)` int64."""
    lam: Tensor
    """Share of the first image, `(N,)` floating, in [0, 1]."""
