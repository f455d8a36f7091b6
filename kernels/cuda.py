"""From a checked request to one launch of the CUDA kernel. Nothing here waits for the device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coursepack.kernels import nvrtc
from coursepack.kernels.cuda_source import MOST_TEACHERS, MOST_THREADS
from coursepack.kernels.records import pack, plain, row_major

if TYPE_CHECKING:
    from coursepack.kernels.request import Request

SWITCH = "COURSEPACK_CUDA_KERNEL"
"""Environment variable that asks for the kernel: "1"."""
MOST_BLOCKS = 1024
"""Blocks where rows are too long for shared memory, and each has room of its own elsewhere."""


def is_asked_for() -> bool:
    """Whether the environment asks for the kernel."""
    return os.environ.get(SWITCH) == "1"


def refusal(request: Request) -> str | None:
    """Why the kernel cannot serve a request on a CUDA device that `dispatch` lets through to here; or None.

    Compiles the kernel when it is first asked.
    """
    if request.count > MOST_TEACHERS:
        return f"more than {MOST_TEACHERS} teachers"
    try:
        nvrtc.kernel_for(request.device)
    except nvrtc.KernelUnavailable as err:
        return f"no CUDA kernel: {err}"
    return None


def evaluate(
    student_logits: Tensor, weights: Tensor | None, request: Request, wants_student: bool, wants_weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`native.evaluate` on a CUDA device, where a row with a bad value turns to NaN.

    Args:
        student_logits: `(N, C)` float32, bfloat16 or float16.
        weights: `(N, K)`, or None for 1/K.
        request: the rest of the call, which `refusal` has nothing against.
        wants_student: whether to make the gradient `(N, C)`, in the dtype of the logits.
        wants_weights: whether to make the gradient `(N, K)`, in the dtype of the weights.

    Returns:
        Loss `(N,)` float32 and the gradients of its sum, of which those not wanted are None.

    Raises:
        RuntimeError: the driver refuses the launch.
    """
    r, device = request, request.device
    student = row_major(student_logits)
    loss = torch.empty(r.rows, device=device)
    grad = torch.empty(r.rows, r.classes, dtype=student.dtype, device=device) if wants_student else None
    grad_weights = torch.empty(r.rows, r.count, device=device) if wants_weights else None
    if r.rows:
        _launch(r, weights, student, (loss, grad, grad_weights))
    if grad_weights is not None and weights is not None:
        grad_weights = grad_weights.to(weights.dtype)
    return loss, grad, grad_weights


def threads_for(classes: int) -> int:
    """Threads of a block: about one for four classes, in powers of two."""
    return min(MOST_THREADS, max(64, 1 << (classes // 4).bit_length()))


def _launch(
    r: Request, weights: Tensor | None, student: Tensor, results: tuple[Tensor, Tensor | None, Tensor | None]
) -> None:
    kernel = nvrtc.kernel_for(r.device)
    blocks, shared, scratch = r.rows, 4 * 2 * r.classes, None
    if shared > kernel.shared_bytes:
        blocks, shared = min(r.rows, MOST_BLOCKS), 0
        scratch = torch.empty(blocks, 2 * r.classes, device=r.device)
    double = weights is not None and weights.dtype == torch.float64
    wide = plain(weights, torch.float64 if double else torch.float32)
    # Copies may go when the launch is under way: the allocator gives their memory to later work only.
    data, _held = pack(r, wide, student, results, scratch=scratch, scratch_stride=2 * r.classes)
    kernel.launch(r.device, blocks, threads_for(r.classes), shared, data)
