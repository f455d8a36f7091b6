"""Mean squared error of a student's features to stored rows of a teacher's, decoded on the way.

On the CPU a compiled pass reads the rows as they are stored and writes the errors in the memory format of the
student's features. The backward pass of a linear map reads the errors twice, and scales what is smaller.
"""

from __future__ import annotations

import ctypes
import math
import struct
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
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
_KINDS = {torch.float32: layout.FLOAT32, torch.float16: layout.FLOAT16}


def squared_error(features: Tensor, rows: Rows | Tensor) -> Tensor:
    """Return the mean squared error `(N,)` float32 of each sample, with gradient to the student's features.

    Args:
        features: the student's features `(N, ...)` float32.
        rows: the teacher's, of the same shape; constant.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shape(rows, tuple(features.shape))
    if not _is_read(features):
        error = features - decode(rows).detach()
        return error.square().flatten(1).mean(1)
    loss: Tensor = _SquaredError.apply(features, _stored(rows))
    return loss


def _is_read(features: Tensor) -> bool:
    """True if the compiled function can read the features."""
    return (
        is_eager_cpu(features.device)
        and dispatch.NUMBA_IS_INSTALLED
        and features.dtype == torch.float32
        and features.numel() > 0
    )


def linear_squared_error(features: Tensor, weight: Tensor, bias: Tensor, rows: Rows | Tensor) -> Tensor:
    """Return `squared_error` of features mapped linearly at every position, with gradient to the map as well.

    Args:
        features: the student's features `(N, C, H, W)` or `(N, C)`, float32.
        weight: weight of the map, `(C', C, 1, 1)` or `(C', C)`.
        bias: bias of the map `(C',)`.
        rows: the teacher's features `(N, C', H, W)` or `(N, C')`; constant.

    Raises:
        ValueError: the shapes differ.
    """
    if not _is_read(features):
        return squared_error(_mapped(features, weight, bias), rows)
    _check_shape(rows, (len(features), len(weight), *features.shape[2:]))
    loss: Tensor = _LinearSquaredError.apply(features, weight, bias, _stored(rows))
    return loss


def _mapped(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(features, weight, bias) if features.ndim == 4 else F.linear(features, weight, bias)


def _check_shape(rows: Rows | Tensor, expected: tuple[int, ...]) -> None:
    if tuple(rows.shape) != expected:
        raise ValueError(f"rows have shape {tuple(rows.shape)}, expected {expected}")


def _stored(rows: Rows | Tensor) -> Tensor:
    """Return the rows in a dtype that the compiled function reads."""
    stored = rows.values if isinstance(rows, DenseRows) else rows
    return (stored if isinstance(stored, Tensor) and stored.dtype in _KINDS else decode(rows)).detach()


class _SquaredError(torch.autograd.Function):
    """Autograd Function that keeps the errors."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, stored: Tensor) -> Tensor:
        loss, errors = _evaluate(features.detach(), stored)
        ctx.save_for_backward(errors)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (errors,) = ctx.saved_tensors
        factor = grad_loss * (2 / math.prod(errors.shape[1:]))
        return errors * factor.reshape(-1, *[1] * (errors.ndim - 1)), None


class _LinearSquaredError(torch.autograd.Function):
    """Autograd Function of a linear map and the squared error of its result."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, stored: Tensor) -> Tensor:
        loss, errors = _evaluate(_mapped(features, weight, bias), stored)
        ctx.save_for_backward(features, weight, errors)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        features, weight, errors = ctx.saved_tensors
        own, error = _by_position(features), _by_position(errors)
        factor = grad_loss * (2 / math.prod(errors.shape[1:]))
        factor = factor.repeat_interleave(len(own) // len(features))[:, None]
        # The bias is the weight of a feature that is always 1.
        slopes = error.T @ torch.cat([own * factor, factor], 1)
        grad_features = None
        if ctx.needs_input_grad[0]:
            moved = (error @ weight.flatten(1)).mul_(factor)
            grad_features = moved.reshape(len(features), *features.shape[2:], -1).movedim(-1, 1)
        return grad_features, slopes[:, :-1].reshape(weight.shape), slopes[:, -1], None


def _by_position(values: Tensor) -> Tensor:
    """Return maps `(N, C, H, W)` or vectors as `(N H W, C)`; no copy if channels are last in memory."""
    return values.movedim(1, -1).reshape(-1, values.shape[1])


def _evaluate(features: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss `(N,)` and the errors, in the memory format of the features."""
    samples, *shape = features.shape
    is_last = features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
    values = features if is_last else features.contiguous()
    stored = stored.contiguous()
    # Channels come first in a row: with channels last, or of one position, the order is the same.
    is_transposed = is_last and not features.is_contiguous()
    channels, positions = (shape[0], math.prod(shape[1:])) if is_transposed else (math.prod(shape), 1)
    loss, errors = native.floats(samples), torch.empty_like(values)
    threads, _ = usable_threads(features.numel(), PARALLEL_FROM)
    scratch = native.floats(2 * threads, channels * positions)
    counters = (ctypes.c_int64 * 2)()
    ticket = ctypes.addressof(counters)
    call = (
        values.data_ptr(), stored.data_ptr(), errors.data_ptr(), loss.data_ptr(),
        samples, _KINDS[stored.dtype], channels, positions,
        scratch.data_ptr(), ticket, ticket + 8, max(1, samples // (8 * threads)),
    )  # fmt: skip
    run_kernel(native.compiled("jit_regression"), struct.pack("12q", *call), threads)
    return loss, errors
