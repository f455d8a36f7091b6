"""Rows of four bits a class: gaps below the top logit, in steps that grow with the gap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coursepack.kernels.rows import check_dtype, check_shape, is_eager_cpu, moved, target

OFFSET = 15
"""Number added to a code in `code (code + OFFSET)`: halfway from squares to equal steps."""
LARGEST_CODE = 15
LARGEST_GAP = LARGEST_CODE * (LARGEST_CODE + OFFSET)
"""Value of `code (code + OFFSET)` at the end of a row's range."""


@dataclass(frozen=True)
class Int4Rows:
    """Rows with a code of four bits for every class, and top logit and range per row.

    With H = ceil(C / 2), byte c of a row holds the code of class c in its lower four bits and that of class
    H + c in its upper four bits. The logit of a class with code q is `top - range q (q + 15) / 450`.
    """

    q: Tensor
    """Codes `(N, ceil(C / 2))` uint8, two to a byte."""
    scale: Tensor
    """Top logit and range of each row `(N, 2)` float16."""
    classes: int
    """Number of classes C."""

    def __post_init__(self) -> None:
        check_dtype("q", self.q, torch.uint8)
        check_dtype("scale", self.scale, torch.float16)
        check_shape("q", self.q, (len(self.q), -(-self.classes // 2)))
        check_shape("scale", self.scale, (len(self.q), 2))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded rows."""
        return (len(self.q), self.classes)

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.q.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Int4Rows:
        """Copy the rows to another device."""
        return moved(self, device, non_blocking)

    def codes(self) -> Tensor:
        """Return the code of every class `(N, C)` uint8."""
        return torch.cat([self.q & 15, self.q >> 4], dim=1)[:, : self.classes]

    def decode(self, temperature: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Decode to float32."""
        out = target(self, out)
        if is_eager_cpu(self.device):
            from coursepack.kernels.cpu.jit_int4 import int4_decode

            int4_decode(self.q.contiguous().numpy(), self.scale.float().contiguous().numpy(), out.numpy())
            return out
        return self._decode_unseen(out)

    def _decode_unseen(self, out: Tensor) -> Tensor:
        code, scale = self.codes().float(), self.scale.float()
        return out.copy_(scale[:, :1] - code * (code + OFFSET) * (scale[:, 1:] * (1 / LARGEST_GAP)))
