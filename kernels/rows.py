"""Encoded rows: a batch of teacher values in their stored form.

The loss reads encoded rows directly, so no float32 copy is moved or kept. `decode` returns float32. It takes
the temperature, because the values of classes that a sparse encoding dropped depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from _typeshed import DataclassInstance

DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE = torch.ones(1, dtype=torch.float32, device="cpu")

TAIL_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
"""Temperatures at which `TopKRows` stores the mass of the dropped classes."""


@runtime_checkable
class Rows(Protocol):
    """Interface of all encoded rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded rows: `(N, C)` for logits."""

    @property
    def device(self) -> torch.device:
        """Device of the rows."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Copy the rows to another device."""

    def decode(self, temperature: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Decode to float32.

        Args:
            temperature: the temperature `(N,)` the rows are used at; None means 1.
            out: contiguous float32 tensor of the decoded shape to write to, instead of a new one.
        """


def is_eager_cpu(device: torch.device) -> bool:
    """True on the CPU outside `torch.compile`, where values can be checked and numba called."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


R = TypeVar("R", bound="DataclassInstance")


@dataclass(frozen=True)
class DenseRows:
    """Rows with one floating-point number per value: the encodings `float32`, `float16` and `bfloat16`."""

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
        """Device of the rows."""
        return self.values.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DenseRows:
        """Copy the rows to another device."""
        return moved(self, device, non_blocking)

    def decode(self, temperature: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Decode to float32; returns the stored tensor itself if it is float32 already."""
        return self.values.float() if out is None else target(self, out).copy_(self.values)


@dataclass(frozen=True)
class Int8Rows:
    """Rows with one byte per value, `minimum + scale * q` with scale and minimum per row."""

    q: Tensor
    """`(N, ...)` uint8."""
    affine: Tensor
    """Scale and minimum of each row `(N, 2)` float16."""

    def __post_init__(self) -> None:
        check_dtype("q", self.q, torch.uint8)
        check_dtype("affine", self.affine, torch.float16)
        check_shape("affine", self.affine, (len(self.q), 2))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded rows."""
        return tuple(self.q.shape)

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.q.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Int8Rows:
        """Copy the rows to another device."""
        return moved(self, device, non_blocking)

    def decode(self, temperature: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Decode to float32."""
        affine = self.affine.float()
        if is_eager_cpu(self.device):
            from coursepack.kernels.cpu.jit_decode import int8_decode

            out, flat = target(self, out), (len(self.q), math.prod(self.q.shape[1:]))
            int8_decode(self.q.reshape(flat).numpy(), affine.numpy(), out.view(flat).numpy())
            return out
        scale, minimum = (affine[:, column].reshape(-1, *[1] * (self.q.ndim - 1)) for column in (0, 1))
        return target(self, out).copy_(self.q).mul_(scale).add_(minimum)


@dataclass(frozen=True)
class TopKRows:
    """Rows with the k largest logits, their class ids, and the mass of all others at four temperatures.

    All dropped classes decode to the same logit, chosen so that their total mass is right at the requested
    temperature. The mass is interpolated in 1/T, in which its logarithm is convex.
    """

    ids: Tensor
    """Class ids `(N, k)` uint16 or uint32, distinct, including the label."""
    values: Tensor
    """Their logits `(N, k)` float16."""
    tail: Tensor
    """Log of `sum exp((z - max z) / T)` over dropped classes, `(N, 4)` float16, at `TAIL_TEMPERATURES`."""
    classes: int
    """Number of classes C."""

    def __post_init__(self) -> None:
        if self.ids.dtype not in (torch.uint16, torch.uint32):
            raise TypeError(f"ids have dtype {self.ids.dtype}, expected uint16 or uint32")
        check_dtype("values", self.values, torch.float16)
        check_dtype("tail", self.tail, torch.float16)
        check_shape("values", self.values, tuple(self.ids.shape))
        check_shape("tail", self.tail, (len(self.ids), len(TAIL_TEMPERATURES)))
        if self.ids.shape[1] > self.classes:
            raise ValueError(f"ids has {self.ids.shape[1]} columns, expected at most {self.classes} classes")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded rows."""
        return (len(self.ids), self.classes)

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.ids.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TopKRows:
        """Copy the rows to another device."""
        return moved(self, device, non_blocking)

    def decode(self, temperature: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Decode to float32; the dropped classes have the right mass at each row's temperature."""
        if is_eager_cpu(self.device):
            return self._decode_cpu(temperature, target(self, out))
        return self._decode_unseen(temperature, target(self, out))

    def _decode_unseen(self, temperature: Tensor | None, out: Tensor) -> Tensor:
        # Refusing an invalid id would wait for the device, so its row becomes NaN.
        ids = self.ids.to(torch.int64)
        bad = (ids >= self.classes).any(1, keepdim=True)
        values = self.values.float().masked_fill(bad, float("nan"))
        fill = self.tail_logit(values, temperature)[:, None]
        return out.copy_(fill.expand(self.shape)).scatter_(1, ids.clamp_(max=self.classes - 1), values)

    def _decode_cpu(self, temperature: Tensor | None, out: Tensor) -> Tensor:
        from coursepack.kernels.cpu.jit_decode import topk_decode

        rows = len(self.ids)
        inverse = ONE if temperature is None else 1 / temperature.to(torch.float32)
        knots = np.array([0.0, *(1 / t for t in reversed(TAIL_TEMPERATURES))], dtype=np.float32)
        bad = topk_decode(
            self.ids.numpy(),
            self.values.float().numpy(),
            self.tail.float().numpy(),
            inverse.expand(rows).contiguous().numpy(),  # the compiled function does not check bounds
            knots,
            out.numpy(),
        )
        if bad >= 0:
            highest = int(self.ids[bad].to(torch.int64).max())
            raise ValueError(f"ids holds {highest} in row {bad}, expected class ids 0..{self.classes - 1}")
        return out

    def tail_logit(self, values: Tensor, temperature: Tensor | None) -> Tensor:
        """Logit `(N,)` float32 of every dropped class: `max z + T (log mass(T) - log count)`."""
        dropped = self.classes - self.ids.shape[1]
        return tail_logit(values.amax(1), self.tail.float(), TAIL_TEMPERATURES, dropped, temperature)


@dataclass(frozen=True)
class BitRows:
    """Rows with the sign of every value, eight to a byte."""

    bits: Tensor
    """`(N, ceil(D / 8))` uint8, the first value in the highest bit; 1 where it is positive."""
    row_shape: tuple[int, ...]
    """Shape of a decoded row, of D values."""

    def __post_init__(self) -> None:
        check_dtype("bits", self.bits, torch.uint8)
        check_shape("bits", self.bits, (len(self.bits), -(-math.prod(self.row_shape) // 8)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded rows."""
        return (len(self.bits), *self.row_shape)

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.bits.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BitRows:
        """Copy the rows to another device."""
        return moved(self, device, non_blocking)

    def decode(self, temperature: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Decode to +1 where the value was positive and -1 elsewhere, float32."""
        count = math.prod(self.row_shape)
        if is_eager_cpu(self.device):
            from coursepack.kernels.cpu.jit_decode import bit_decode

            out = target(self, out)
            bit_decode(self.bits.numpy(), out.view(len(self.bits), count).numpy())
            return out
        shifts = torch.arange(7, -1, -1, device=self.device, dtype=torch.uint8)
        ones = (self.bits[:, :, None] >> shifts & 1).flatten(1)[:, :count]
        return target(self, out).copy_(ones.reshape(self.shape)).mul_(2).sub_(1)


def decode(rows: Rows | Tensor, temperature: Tensor | None = None) -> Tensor:
    """Decode rows, or convert a floating-point tensor, to float32.

    Args:
        rows: encoded rows, or a tensor.
        temperature: the temperature `(N,)` the rows are used at, which rows of the largest logits need; None
            means 1.
    """
    return rows.float() if isinstance(rows, Tensor) else rows.decode(temperature)


def tail_logit(
    top: Tensor, tail: Tensor, temperatures: Sequence[float], dropped: int, temperature: Tensor | None
) -> Tensor:
    """Return the logit `(N,)` float32 of every dropped class: `top + T (log mass(T) - log dropped)`.

    Args:
        top: the largest logit of each row `(N,)` float32.
        tail: log masses of the dropped classes `(N, J)` float32 at J ascending temperatures, the first 1.
        temperatures: these temperatures.
        dropped: number of dropped classes.
        temperature: the temperature `(N,)` the rows are used at; None means 1.
    """
    if dropped == 0:
        return top
    limit = math.log(dropped)
    if temperature is None:
        return top + (tail[:, 0] - limit).clamp_(max=0)
    temperature = temperature.to(torch.float32)
    # Knots in 1/T, from the limit at 0; beyond T = 1 the last segment goes on.
    # Filled one by one: a copy from the host would wait for the device.
    knots = torch.cat([tail.new_full((1,), knot) for knot in (0.0, *(1 / t for t in reversed(temperatures)))])
    masses = torch.cat([torch.full_like(tail[:, :1], limit), tail.flip(1)], dim=1)
    inverse = 1 / temperature
    segment = torch.bucketize(inverse, knots[1:-1])[:, None]
    low, high = masses.gather(1, segment)[:, 0], masses.gather(1, segment + 1)[:, 0]
    start, stop = knots[segment[:, 0]], knots[segment[:, 0] + 1]
    mass = low + (high - low) * (inverse - start) / (stop - start)
    # No dropped class scores above the top one, so neither may their common logit.
    return top + (temperature * (mass - limit)).clamp_(max=0)


def moved(rows: R, device: torch.device | str, non_blocking: bool) -> R:
    """Copy the tensors of rows to another device."""
    tensors = {
        field.name: getattr(rows, field.name).to(device, non_blocking=non_blocking)
        for field in fields(rows)
        if isinstance(getattr(rows, field.name), Tensor)
    }
    return replace(rows, **tensors)


def target(rows: Rows, out: Tensor | None) -> Tensor:
    """Return `out` after checks, or a new tensor for the decoded rows."""
    if out is None:
        return torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    check_dtype("out", out, torch.float32)
    check_shape("out", out, tuple(rows.shape))
    if not out.is_contiguous() or out.device != rows.device:
        raise ValueError(
            f"out is on {out.device} or not contiguous, expected a contiguous tensor on {rows.device}"
        )
    return out


def check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError if a tensor has another dtype."""
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor has another shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
