"""Runs a checked call on the compiled CPU kernels: scratch memory, records, threads and errors."""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coursepack.kernels.cpu.records import KINDS as KINDS
from coursepack.kernels.cpu.records import pack, plain, row_major
from coursepack.kernels.cpu.threads import run_kernel, usable_threads
from coursepack.kernels.rows import TopKRows
from coursepack.kernels.spec import reduced
from coursepack.kernels.values import check_values, full_weights

if TYPE_CHECKING:
    from coursepack.kernels.cpu.records import Results
    from coursepack.kernels.spec import LossCall

PARALLEL_FROM = 40_000
"""Number of exponentials above which more than one thread is faster."""
LOT = 64
CPU = torch.device("cpu")
_SCALAR = torch.zeros((), dtype=torch.float32, device=CPU)
_LARGEST_KEPT = 1 << 22
_buffers = threading.local()
_State = ctypes.c_int64 * 4


def work_of(call: LossCall) -> int:
    """Estimate the number of exponentials in a call."""
    return call.rows * call.classes * (call.teacher_count + 1)


def shares(threads: int) -> int:
    """Return the field `shares` of `layout`: half of the rows are left when every thread has a chunk."""
    return 2 * threads if threads > 1 else 1


def evaluate(
    call: LossCall, student_logits: Tensor, weights: Tensor | None, wants_student: bool, wants_weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the loss float32, `(N,)` or reduced, and the gradients of its sum, or of its mean if that is
    the reduction; None for those not wanted.

    Args:
        call: a call for which `dispatch.choose` returns the kernel.
        student_logits: `(N, C)` float32, bfloat16 or float16 on the CPU.
        weights: `(N, K)`, or None for 1/K.
        wants_student: compute the gradient `(N, C)`, in the dtype of the logits.
        wants_weights: compute the gradient `(N, K)`, in the dtype of the weights.

    Raises:
        ValueError: an invalid label, class id, temperature or weight; the text names the first.
    """
    reduction = call.spec.reduction
    total = None if reduction == "none" or call.rows == 0 else torch.empty_like(_SCALAR)
    loss = floats(call.rows) if total is None else _kept("loss", call.rows)
    scale = 1 / max(1, call.rows) if reduction == "mean" else 1.0
    student = row_major(student_logits)
    grad = None
    if wants_student:
        grad = torch.empty(call.rows, call.classes, dtype=student.dtype, device=CPU)
    grad_weights = floats(call.rows, call.teacher_count) if wants_weights else None
    kept = call.teacher_count if wants_weights and call.spec.combine == "mixture" else 0
    _launch(
        "jit_loss" if call.spec.divergence == "kl" else "jit_divergences",
        call,
        weights,
        student,
        (loss, total, grad, grad_weights),
        scratch_rows=6 + kept,
        grad_scale=scale,
    )
    if grad_weights is not None and weights is not None:
        grad_weights = grad_weights.mul_(scale).to(weights.dtype)
    return reduced(loss, reduction) if total is None else total, grad, grad_weights


def mixture(call: LossCall) -> Tensor:
    """Compute `sum_k w_k P_k`, `(N, C)` float32, for a call that `dispatch.reads_teachers` accepts.

    Raises:
        ValueError: an invalid label, class id, temperature or weight; the text names the first.
    """
    out = floats(call.rows, call.classes)
    _launch("jit_mixture", call, call.wide_weights, None, (None, None, out, None), scratch_rows=3)
    return out


def statistics(student_logits: Tensor | None, call: LossCall) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the fields of `stats.TeacherStats` for a call that `dispatch.reads_teachers` accepts.

    Returns:
        `(4, K, N)` float32: entropy, norm, cross-entropy, cosine; top classes `(K, N)` int64; and whether
        they are right `(K, N)` bool. What needs labels or `student_logits` has no meaning without.

    Raises:
        ValueError: an invalid label or class id; the text names the first.
    """
    shape = (call.teacher_count, call.rows)
    numbers, tops = floats(4, *shape), torch.empty(shape, dtype=torch.int64, device=CPU)
    correct = torch.empty(shape, dtype=torch.bool, device=CPU)
    student = None if student_logits is None else row_major(student_logits)
    _launch("jit_stats", call, None, student, (numbers, None, correct, tops), scratch_rows=3)
    return numbers, tops, correct


def _launch(
    module: str,
    call: LossCall,
    weights: Tensor | None,
    student: Tensor | None,
    results: Results,
    *,
    scratch_rows: int,
    grad_scale: float = 1.0,
) -> None:
    """Run the compiled function of a module on a call, with `scratch_rows` rows of scratch per thread."""
    threads, _ = usable_threads(work_of(call), PARALLEL_FROM)
    stride = scratch_rows * -(-call.classes // LOT) * LOT
    scratch = _kept("scratch", threads * stride)
    state = _State()
    data, held = pack(
        call,
        plain(weights, torch.float64),
        student,
        results,
        shares=shares(threads),
        state=ctypes.addressof(state),
        scratch=scratch,
        scratch_stride=stride,
        grad_scale=grad_scale,
    )
    run_kernel(compiled(module), data, threads)
    del held  # tensors must live until here
    if state[2]:
        _explain(call, state[2] - 1)


@functools.cache
def compiled(module: str) -> int:
    """Return the address of the function that a module compiles at its first import."""
    return int(importlib.import_module(f"coursepack.kernels.cpu.{module}").run.address)


def floats(*shape: int) -> Tensor:
    """Return memory for float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(*shape, dtype=torch.float32, device=CPU)


def _kept(name: str, size: int) -> Tensor:
    """Return a float32 buffer, kept under its name for the next call in this thread unless it is large."""
    kept: Tensor | None = getattr(_buffers, name, None)
    if kept is not None and kept.numel() >= size:
        return kept
    buffer = floats(size)
    if size <= _LARGEST_KEPT:
        setattr(_buffers, name, buffer)
    return buffer


def _explain(call: LossCall, row: int) -> None:
    """Raise the error that the checks in torch raise for a bad value."""
    check_values(call)
    full_weights(call)
    for teacher in call.teacher_list:
        if isinstance(teacher, TopKRows):
            teacher.decode()
    raise RuntimeError(f"the compiled loss refused row {row}, and the checks in torch did not")
