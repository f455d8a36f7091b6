"""Limits of the fused loss: loops that do a part of its work, and an autograd Function that does none."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.kernels.cpu import native
from coursepack.kernels.cpu.threads import run_kernel, usable_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


FACTOR = 0.36
"""Factor that turns logits into exponents of two at T = 4."""


class Ready(torch.autograd.Function):
    """Autograd Function whose loss and gradient are there already."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor) -> Tensor:
        ctx.gradient = torch.empty_like(student_logits)
        return student_logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        gradient: Tensor
        gradient, ctx.gradient = ctx.gradient, None  # a gradient that is held would be copied
        return gradient


def only_autograd(student_logits: Tensor, _: Any) -> Tensor:
    loss: Tensor = Ready.apply(student_logits)
    return loss


class Loop:
    """Compiled loop over rows of the student and of teachers, with the kernel's launch and torch's threads.

    Both read every input and write a gradient. `floor` does nothing else; `exponentials` decodes every row,
    finds its largest logit and computes the exponential of every logit.
    """

    def __init__(self, name: str) -> None:
        self._function = {"floor": _floor, "exponentials": _exponentials}[name]()

    def __call__(self, student: Tensor, teachers: Tensor) -> None:
        count, rows, classes = teachers.shape
        threads, _ = usable_threads(rows * classes * (count + 1), native.PARALLEL_FROM)
        grad, tickets = torch.empty_like(student), (ctypes.c_int64 * 2)()
        length = -(-classes // native.LOT) * native.LOT
        scratch, start = torch.empty(2 * threads * length), ctypes.addressof(tickets)
        places = (student.data_ptr(), teachers.data_ptr(), grad.data_ptr(), scratch.data_ptr())
        call = (*places, rows, classes, count, start, start + 8, native.shares(threads))
        run_kernel(self._function.address, struct.pack("10q", *call), threads)


def _floor() -> Any:
    from coursepack.kernels.cpu.jit_base import njit
    from coursepack.kernels.cpu.jit_math import SUMS, load, load_uint32, store, wide_vectors

    @njit(fastmath=SUMS)
    def copy(origin: int, out: int, count: int) -> None:
        wide_vectors()
        for c in range(count):
            store(out, c, load(origin, c))

    @njit(fastmath=SUMS)
    def add_up(values: int, count: int) -> int:
        wide_vectors()
        total = np.uint32(0)
        for c in range(count):
            total ^= load_uint32(values, c)
        return total

    @njit
    def of_student(row: int, out: int, classes: int, scratch: int) -> None:  # noqa: ARG001  # as in `_exponentials`
        copy(row, out, classes)

    @njit
    def of_teacher(row: int, out: int, classes: int, scratch: int) -> None:  # noqa: ARG001  # as in `_exponentials`
        store(out, 0, np.float32(add_up(row, classes // 2)))

    return _each_row(of_student, of_teacher)


def _exponentials() -> Any:
    from coursepack.kernels.cpu.jit_base import float32, njit
    from coursepack.kernels.cpu.jit_convert import LOT, lots, read_float32, read_half, write_float32
    from coursepack.kernels.cpu.jit_math import store
    from coursepack.kernels.cpu.jit_softmax import exponentials

    @njit
    def of_student(row: int, out: int, classes: int, scratch: int) -> None:
        length = lots(classes + LOT - 1)
        top = read_float32(row, classes, float32(1), float32(0), scratch)
        exponentials(scratch, top, float32(FACTOR), scratch + 4 * length, length, out, 4 * classes)
        write_float32(scratch + 4 * length, out, classes)

    @njit
    def of_teacher(row: int, out: int, classes: int, scratch: int) -> None:
        length = lots(classes + LOT - 1)
        top = read_half(row, classes, float32(1), float32(0), scratch)
        ahead = row + 2 * classes
        total = exponentials(scratch, top, float32(FACTOR), scratch + 4 * length, length, ahead, 2 * classes)
        store(out, 0, float32(total))

    return _each_row(of_student, of_teacher)


def _each_row(of_student: Callable[..., None], of_teacher: Callable[..., None]) -> Any:
    """Compile a loop that calls a function for each row of the student, and one for each of a teacher's."""
    from coursepack.kernels.cpu.jit_base import carray, compiled, types
    from coursepack.kernels.cpu.jit_call import SMALLEST_CHUNK
    from coursepack.kernels.cpu.jit_math import fetch_add, load_int64

    @compiled(types.void(types.voidptr))
    def run(data: Any) -> None:
        student, teachers, grad, scratch, rows, classes, count, ticket, thread, shares = carray(
            data, (10,), np.int64
        )
        own = scratch + 8 * fetch_add(thread, 1) * (-(-classes // 64) * 64)
        size = max(SMALLEST_CHUNK, (rows - load_int64(ticket, 0)) // shares)
        start = fetch_add(ticket, size)
        while start < rows:
            for n in range(start, min(start + size, rows)):
                out = grad + 4 * n * classes
                of_student(student + 4 * n * classes, out, classes, own)
                for k in range(count):
                    of_teacher(teachers + 2 * (k * rows + n) * classes, out, classes, own)
            size = max(SMALLEST_CHUNK, (rows - load_int64(ticket, 0)) // shares)
            start = fetch_add(ticket, size)

    return run
