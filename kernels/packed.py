"""Top-k rows in a compact form: sorted class ids, and gaps below the top logit in codes of six bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coursepack.kernels.rows import ONE, check_dtype, check_shape, is_eager_cpu, moved, tail_logit, target

CODE_BITS = 6
LARGEST_CODE = (1 << CODE_BITS) - 1
PACKED_TAIL_TEMPERATURES = (1.0, 4.0)
"""Temperatures at which `PackedTopKRows` stores the mass of the dropped classes."""


def low_bits(classes: int, kept: int) -> int:
    """Return how many bits of each class id are stored as they are: the number with the shortest rows."""
    largest = classes - 1
    low = max(0, (largest // (kept + 1)).bit_length() - 1)
    # One bit more takes `kept` bits, and saves those of every other high part.
    return low + ((largest >> low) - (largest >> low + 1) > kept)


def packed_bytes(classes: int, kept: int) -> int:
    """Return the size of the ids and codes of one row."""
    low = low_bits(classes, kept)
    return -(-(kept * (1 + low + CODE_BITS) + ((classes - 1) >> low)) // 8)


@dataclass(frozen=True)
class PackedTopKRows:
    """Rows with some of the largest logits, bit by bit, and the mass of all others at two temperatures.

    A row of `entries` is a sequence of bits, the lowest bit of a byte first. With the kept classes c_0 < c_1
    < ... and `low_bits` l: first `kept + ((classes - 1) >> l)` bits, of which those at `(c_i >> l) + i` are
    set; then the l low bits of each class; then a code q_i of six bits for each. The logit of c_i is
    `top - range (q_i / 63)²`. Dropped classes have one common logit, as in `TopKRows`.
    """

    entries: Tensor
    """`(N, packed_bytes)` uint8."""
    scale: Tensor
    """Top logit, range, and the log of `sum exp((z - max z) / T)` over dropped classes at T = 1 and 4, `(N,
    4)` float16."""
    kept: int
    """Number of kept classes k."""
    classes: int
    """Number of classes C."""

    def __post_init__(self) -> None:
        check_dtype("entries", self.entries, torch.uint8)
        check_dtype("scale", self.scale, torch.float16)
        if not 1 <= self.kept <= self.classes:
            raise ValueError(f"kept is {self.kept}, expected 1 to {self.classes} classes")
        check_shape("entries", self.entries, (len(self.entries), packed_bytes(self.classes, self.kept)))
        check_shape("scale", self.scale, (len(self.entries), 2 + len(PACKED_TAIL_TEMPERATURES)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded rows."""
        return (len(self.entries), self.classes)

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.entries.device

    @property
    def low_bits(self) -> int:
        """Number of bits of each class id that are stored as they are."""
        return low_bits(self.classes, self.kept)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedTopKRows:
        """Copy the rows to another device."""
        return moved(self, device, non_blocking)

    def decode(self, temperature: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Decode to float32; the dropped classes have the right mass at each row's temperature."""
        out = target(self, out)
        return (
            self._decode_cpu(temperature, out)
            if is_eager_cpu(self.device)
            else self._decode_unseen(temperature, out)
        )

    def check(self) -> None:
        """Check the class ids of rows on the CPU.

        Raises:
            ValueError: a row without k ascending class ids; the text names the first.
        """
        from coursepack.kernels.cpu.jit_packed import packed_bad_row

        bad = packed_bad_row(self.entries.contiguous().numpy(), self.kept, self.classes, self.low_bits)
        if bad >= 0:
            raise ValueError(
                f"entries hold no {self.kept} ascending class ids in row {bad}, expected ids "
                f"0..{self.classes - 1}"
            )

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return class ids and codes `(N, k)` int64, and a mask `(N,)` of rows with ascending class ids.

        Ids of other rows are clamped to classes.
        """
        kept, low = self.kept, self.low_bits
        high = kept + ((self.classes - 1) >> low)
        counts = self._fields(0, high, 1).cumsum(1)
        numbers = torch.arange(kept, device=self.device)
        # Position of the i-th bit that is set.
        positions = torch.searchsorted(counts, (numbers + 1).expand(len(counts), kept).contiguous())
        ids = (positions - numbers << low) | self._fields(high, kept, low)
        valid = (counts[:, -1] == kept) & (ids < self.classes).all(1) & (ids.diff(dim=1) > 0).all(1)
        codes = self._fields(high + kept * low, kept, CODE_BITS)
        return ids.clamp(0, self.classes - 1), codes, valid

    def tail_logit(self, temperature: Tensor | None) -> Tensor:
        """Logit `(N,)` float32 of every dropped class: `max z + T (log mass(T) - log count)`."""
        scale = self.scale.float()
        dropped = self.classes - self.kept
        return tail_logit(scale[:, 0], scale[:, 2:], PACKED_TAIL_TEMPERATURES, dropped, temperature)

    def _fields(self, start: int, count: int, width: int) -> Tensor:
        """Return numbers `(N, count)` int64 of so many bits that follow each other from bit `start` on."""
        first = start + width * torch.arange(count, device=self.device)
        word = torch.zeros(len(self.entries), count, dtype=torch.int64, device=self.device)
        for index in range(-(-(width + 7) // 8)):
            byte = (first // 8 + index).clamp(max=self.entries.shape[1] - 1)
            word |= self.entries[:, byte].to(torch.int64) << 8 * index
        return word >> first % 8 & (1 << width) - 1

    def _decode_unseen(self, temperature: Tensor | None, out: Tensor) -> Tensor:
        # Refusing an invalid id would wait for the device, so its row becomes NaN.
        ids, codes, valid = self.unpack()
        scale = self.scale.float()
        gaps = (codes * codes).float() * (scale[:, 1:2] * (1 / LARGEST_CODE**2))
        values = (scale[:, :1] - gaps).masked_fill(~valid[:, None], float("nan"))
        return out.copy_(self.tail_logit(temperature)[:, None].expand(self.shape)).scatter_(1, ids, values)

    def _decode_cpu(self, temperature: Tensor | None, out: Tensor) -> Tensor:
        from coursepack.kernels.cpu.jit_packed import packed_decode

        entries, scale = self.entries.contiguous(), self.scale.contiguous()
        # The compiled function reads as many temperatures as there are rows.
        inverse = ONE if temperature is None else (1 / temperature.to(torch.float32)).expand(len(out))
        sound = packed_decode(
            entries.data_ptr(),
            scale.data_ptr(),
            inverse.data_ptr(),
            0 if temperature is None else inverse.stride(0),
            out.data_ptr(),
            *out.shape,
            entries.shape[1],
            self.kept,
            self.low_bits,
        )
        if not sound:
            self.check()
        return out
