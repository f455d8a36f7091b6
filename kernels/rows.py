"""Encoded rows: a batch of teachers' logits in the form they are stored in.

The loss takes them as they are, so that nothing wider than the encoding travels or is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@runtime_checkable
class Rows(Protocol):
    """What every kind of encoded rows offers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded rows: `(N, C)` for logits."""

    @property
    def device(self) -> torch.device:
        """Where the rows are."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same rows on another device."""

    def decode(self) -> Tensor:
        """The values, float32."""


@dataclass(frozen=True)
class DenseRows:
    """One floating-point number per value: the encodings `float32`, `float16` and `bfloat16`."""

    values: Tensor
    """`(N, ...)` float32, float16 or bfloat16."""

    def __post_init__(self) -> None:
        if self.values.dtype not in DENSE_DTYPES:
            raise TypeError(
                f"dense rows have dtype {self.values.dtype}, expected one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DENSE_DTYPES)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded rows."""
        return tuple(self.values.shape)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.values.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DenseRows:
        """The same rows on another device."""
        return DenseRows(self.values.to(device, non_blocking=non_blocking))

    def decode(self) -> Tensor:
        """The values, float32; a view of the stored tensor where that is float32 already."""
        return self.values.float()


def decode(rows: Rows | Tensor) -> Tensor:
    """Teacher logits `(N, C)` float32 from encoded rows or from a floating-point tensor."""
    return rows.float() if isinstance(rows, torch.Tensor) else rows.decode()
