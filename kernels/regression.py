"""Mean squared error of a student's features to stored rows of a teacher's, decoded on the way."""

from __future__ import annotations

import ctypes
import math
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coursepack.kernels import dispatch
from coursepack.kernels.cpu import layout, native
from coursepack.kernels.cpu.threads import run_kernel, usable_threads
from coursepack.kernels.rows import DenseRows, decode, is_eager_cpu

if TYPE_CHECKING:
    from coursepack.kernels.rows import Rows

PARALLEL_FROM = 1 << 18
"""Number of values above which more than one thread is faster."""
USED_TWICE = "squared_error keeps its gradient for one backward pass only: call it again for a second one"
_KINDS = {torch.float32: layout.FLOAT32, torch.float16: layout.FLOAT16}


def squared_error(features: Tensor, rows: Rows | Tensor) -> Tensor:
    """Return the mean squared error `(N,)` float32 of each sample, with gradient to the student's features.

    Args:
        features: the student's features `(N, ...)` float32.
        rows: the teacher's, of the same shape; constant.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(features.shape) != tuple(rows.shape):
        raise ValueError(f"rows have shape {tuple(rows.shape)}, expected {tuple(features.shape)}")
    if not _is_read(features):
        error = features - decode(rows).detach()
        return error.square().flatten(1).mean(1)
    stored = rows.values if isinstance(rows, DenseRows) else rows
    if not isinstance(stored, Tensor) or stored.dtype not in _KINDS:
        stored = decode(rows)
    loss: Tensor = _SquaredError.apply(features, stored.detach())
    return loss


def _is_read(features: Tensor) -> bool:
    """True if the compiled function can read the features."""
    return (
        is_eager_cpu(features.device)
        and dispatch.NUMBA_IS_INSTALLED
        and features.dtype == torch.float32
        and features.numel() > 0
    )


class _SquaredError(torch.autograd.Function):
    """Autograd Function that keeps the errors, and turns them into the gradient in place."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, stored: Tensor) -> Tensor:
        loss, ctx.errors = _evaluate(features.detach(), stored)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        if ctx.errors is None:
            raise RuntimeError(USED_TWICE)
        errors, ctx.errors = ctx.errors, None
        factor = grad_loss * (2 / math.prod(errors.shape[1:]))
        return errors.mul_(factor.reshape(-1, *[1] * (errors.ndim - 1))), None


def _evaluate(features: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss `(N,)` and the errors, in the memory format of the features."""
    samples, *shape = features.shape
    is_last = features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
    values = features if is_last else features.contiguous()
    stored = stored.contiguous()
    # Channels come first in a row: with channels last, or of one position, the order is the same.
    is_transposed = is_last and not features.is_contiguous()
    channels, positions = (shape[0], math.prod(shape[1:])) if is_transposed else (math.prod(shape), 1)
    loss, errors = torch.empty(samples), torch.empty_like(values)
    threads, _ = usable_threads(features.numel(), PARALLEL_FROM)
    scratch = torch.empty(2 * threads, channels * positions)
    counters = (ctypes.c_int64 * 2)()
    ticket = ctypes.addressof(counters)
    call = (
        values.data_ptr(), stored.data_ptr(), errors.data_ptr(), loss.data_ptr(),
        samples, _KINDS[stored.dtype], channels, positions,
        scratch.data_ptr(), ticket, ticket + 8, max(1, samples // (8 * threads)),
    )  # fmt: skip
    run_kernel(native.compiled("jit_regression"), struct.pack("12q", *call), threads)
    return loss, errors
