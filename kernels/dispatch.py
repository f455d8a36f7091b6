"""Choice of the path that computes the fused loss."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coursepack.kernels.cpu import native
from coursepack.kernels.cpu.threads import usable_threads
from coursepack.kernels.int4 import Int4Rows
from coursepack.kernels.packed import PackedTopKRows
from coursepack.kernels.rows import DenseRows, Int8Rows, TopKRows, is_eager_cpu

if TYPE_CHECKING:
    from coursepack.kernels.rows import Rows
    from coursepack.kernels.spec import LossCall

NUMBA_IS_INSTALLED = importlib.util.find_spec("numba") is not None
ANALYTIC, OP, KERNEL = "analytic", "op", "kernel"
PLAIN = (Tensor, torch.nn.Parameter)
"""Classes whose memory can be read through its address."""


@dataclass(frozen=True)
class Choice:
    """Path and threads that `soft_target_loss` uses for given arguments."""

    path: str
    """"kernel" (compiled, CPU), "op" (the same under `torch.compile`) or "analytic" (torch operations)."""
    reason: str
    """Reason for the path."""
    threads: int | None
    """Threads of the kernel; None if torch decides, and for an operator, which decides when it runs."""
    threads_reason: str
    """Reason for the number of threads."""

    def __str__(self) -> str:
        threads = "" if self.threads is None else f"; threads: {self.threads} ({self.threads_reason})"
        return f"{self.path}: {self.reason}{threads}"


def _is_plain(tensor: Tensor) -> bool:
    """True if the memory can be read through its address: no subclass, strided layout."""
    return type(tensor) in PLAIN and tensor.layout == torch.strided


def _reads(teacher: Tensor | Rows | list[Tensor | Rows]) -> bool:
    if isinstance(teacher, list):
        return all(map(_reads, teacher))
    if isinstance(teacher, Tensor):
        return teacher.dtype in native.KINDS and _is_plain(teacher)
    if isinstance(teacher, TopKRows):
        return teacher.ids.shape[1] > 0
    return isinstance(teacher, (DenseRows, Int4Rows, Int8Rows, PackedTopKRows))


def reads_teachers(call: LossCall) -> bool:
    """True if compiled functions can read the teachers and no gradient with respect to weights is needed."""
    on_cpu = is_eager_cpu(call.device) and call.dtype == torch.float32
    wants_gradient = torch.is_grad_enabled() and call.weights is not None and call.weights.requires_grad
    return on_cpu and NUMBA_IS_INSTALLED and not wants_gradient and _reads(call.teachers)


def reads_student(student_logits: Tensor | None) -> bool:
    """True if compiled functions can read the student's logits, or there are none."""
    return student_logits is None or (
        student_logits.is_cpu and student_logits.dtype in native.KINDS and _is_plain(student_logits)
    )


def choose(student_logits: Tensor, call: LossCall) -> tuple[str, str]:
    """Return the path for a call, and the reason: the first that applies."""
    if not student_logits.is_cpu:
        return ANALYTIC, "not on the CPU"
    if call.dtype == torch.float64:
        return ANALYTIC, "computes in float64"
    if not _reads(call.teachers):
        return ANALYTIC, "no kernel for one of the teachers"
    if not NUMBA_IS_INSTALLED:
        return ANALYTIC, "numba is not installed"
    if torch.compiler.is_compiling():
        return OP, "under torch.compile"
    if not _is_plain(student_logits):
        return ANALYTIC, "the student's logits are no plain tensor"
    return KERNEL, "rows on the CPU that the kernel reads"


def describe_call(student_logits: Tensor, call: LossCall) -> Choice:
    """Return the path and the threads for a call."""
    path, reason = choose(student_logits, call)
    if path != KERNEL:
        return Choice(path, reason, None, "")
    return Choice(path, reason, *usable_threads(native.work_of(call), native.PARALLEL_FROM))
