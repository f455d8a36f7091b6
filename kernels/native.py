"""From a checked request to one call of the compiled loss: addresses, room to work in, threads."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coursepack.kernels import call
from coursepack.kernels.arguments import full_weights, spell_out
from coursepack.kernels.labels import MixedLabels
from coursepack.kernels.request import ADJUSTMENTS, COMBINATIONS
from coursepack.kernels.rows import DenseRows, Int8Rows, TopKRows
from coursepack.kernels.threads import run_kernel, usable_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coursepack.kernels.request import Request
    from coursepack.kernels.rows import Rows

KINDS = {torch.float32: call.FLOAT32, torch.float16: call.FLOAT16, torch.bfloat16: call.BFLOAT16}
PARALLEL_FROM = 40_000
"""Exponentials from which on more threads pay for their waking."""
LOT = 64
_LARGEST_KEPT = 1 << 22
_room = threading.local()


def work_of(request: Request) -> int:
    """How many exponentials a request costs, about."""
    return request.rows * request.classes * (request.count + 1)


def evaluate(
    student_logits: Tensor, weights: Tensor | None, request: Request, wants_student: bool, wants_weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss `(N,)` float32 and the gradients of its sum, of which those not wanted are None.

    Args:
        student_logits: `(N, C)` float32, bfloat16 or float16 on the CPU.
        weights: `(N, K)`, or None for 1/K.
        request: the rest of the call, as `dispatch.choose` lets through to here.
        wants_student: whether to make the gradient `(N, C)`, in the dtype of the logits.
        wants_weights: whether to make the gradient `(N, K)`, in the dtype of the weights.

    Raises:
        ValueError: a label, id, temperature or weight that is not allowed; the text names the first.
    """
    from coursepack.kernels.jit_loss import run

    r = request
    loss = torch.empty(r.rows)
    student = _row_major(student_logits)
    grad = torch.empty(r.rows, r.classes, dtype=student.dtype) if wants_student else None
    grad_weights = torch.empty(r.rows, r.count) if wants_weights else None
    keeps = wants_weights and r.combine == "mixture"
    _launch(run, r, weights, student, loss, grad, grad_weights, scratch_rows=6 + r.count * keeps)
    if grad_weights is not None and weights is not None:
        grad_weights = grad_weights.to(weights.dtype)
    return loss, grad, grad_weights


def mixture(weights: Tensor | None, request: Request) -> Tensor:
    """`sum_k w_k P_k`, `(N, C)` float32, of a request that `dispatch.reads_teachers` lets through.

    Raises:
        ValueError: a label, id, temperature or weight that is not allowed; the text names the first.
    """
    from coursepack.kernels.jit_mixture import run

    out = torch.empty(request.rows, request.classes)
    _launch(run, request, weights, None, None, out, None, scratch_rows=3)
    return out


def facts(student_logits: Tensor | None, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """What `stats.TeacherStats` says, of a request that `dispatch.reads_teachers` lets through.

    Returns:
        `(4, K, N)` float32: entropy, norm, cross-entropy, cosine; top classes `(K, N)` int64; and whether
        they are right `(K, N)` bool. What needs labels or `student_logits` has no meaning without.

    Raises:
        ValueError: a label or id that is not allowed; the text names the first.
    """
    from coursepack.kernels.jit_stats import run

    shape = (request.count, request.rows)
    numbers, tops = torch.empty(4, *shape), torch.empty(shape, dtype=torch.int64)
    correct = torch.empty(shape, dtype=torch.bool)
    student = None if student_logits is None else _row_major(student_logits)
    _launch(run, request, None, student, numbers, correct, tops, scratch_rows=3)
    return numbers, tops, correct


def _launch(
    function: Any,
    r: Request,
    weights: Tensor | None,
    student: Tensor | None,
    loss: Tensor | None,
    grad: Tensor | None,
    grad_weights: Tensor | None,
    *,
    scratch_rows: int,
) -> None:
    """Call a compiled function on the records of a request; each thread has rows of scratch."""
    threads, _ = usable_threads(work_of(r), PARALLEL_FROM)
    stride = scratch_rows * -(-r.classes // LOT) * LOT
    scratch = _scratch(threads * stride)
    state = (ctypes.c_int64 * 3)()
    first, second, lam = _labels(r.labels)
    temperature = _temperature(r.temperature)
    row_weight = _column(r.row_weight)
    wide = _plain(weights, torch.float64)
    records = [
        call.pack_call(
            r.rows,
            r.classes,
            r.count,
            max(1, r.rows // (8 * threads)),
            ctypes.addressof(state),
            scratch.data_ptr(),
            stride,
            _address(student),
            0 if student is None else student.stride(0),
            0 if student is None else KINDS[student.dtype],
            _address(loss),
            _address(grad),
            _address(grad_weights),
            _address(first),
            _address(second),
            _address(lam),
            r.ignore_index,
            _address(row_weight),
            *_where(temperature),
            _address(wide),
            *((0, 0) if wide is None else wide.stride()),
            COMBINATIONS.index(r.combine),
            r.soft_weight,
            r.hard_weight,
            r.smoothing,
        )
    ]
    # Whatever is copied must live until the call is over.
    held: list[object] = [student, first, second, lam, temperature, row_weight, wide]
    each = _stack(r.given) if isinstance(r.given, Tensor) else map(_teacher, r.given)
    for k, (parts, fields) in enumerate(each):
        own = temperature if r.teacher_temperatures is None else _temperature(r.teacher_temperatures[k])
        held += [own, parts]
        records.append(call.pack_teacher(*fields, *_where(own), ADJUSTMENTS.index(r.adjustments[k])))
    run_kernel(int(function.address), b"".join(records), threads)
    if state[2]:
        _explain(r, state[2] - 1)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_major(values: Tensor) -> Tensor:
    """The same values as they lie in memory, each row in one piece."""
    values = values.detach().resolve_neg()
    return values if values.stride(1) == 1 or values.shape[1] == 1 else values.contiguous()


def _plain(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The same values in a dtype as they lie in memory."""
    return None if values is None else values.detach().resolve_neg().to(dtype)


def _column(values: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """The same values `(N,)` in one piece."""
    plain = _plain(values, dtype)
    return None if plain is None else plain.contiguous()


def _labels(labels: Tensor | MixedLabels | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if isinstance(labels, MixedLabels):
        first, second = (_column(ids, torch.int64) for ids in (labels.first, labels.second))
        return first, second, _column(labels.lam)
    return _column(labels, torch.int64), None, None


def _temperature(value: float | Tensor) -> float | Tensor:
    plain = _plain(value, torch.float32) if isinstance(value, Tensor) else None
    return value if plain is None else plain


def _where(temperature: float | Tensor) -> tuple[int, int, float]:
    """Address, stride and fixed value of a temperature."""
    if isinstance(temperature, Tensor):
        return temperature.data_ptr(), temperature.stride(0) if temperature.ndim else 0, 0.0
    return 0, 0, temperature


def _stack(teachers: Tensor) -> Iterator[tuple[list[Tensor], tuple[int, ...]]]:
    """`_teacher` of each of `(K, N, C)`, at once."""
    values = teachers.detach().resolve_neg()
    values = values if values.stride(2) == 1 or values.shape[2] == 1 else values.contiguous()
    kind, start, row = KINDS[values.dtype], values.data_ptr(), values.stride(1)
    step = values.stride(0) * values.element_size()
    for k in range(len(values)):
        yield [values], (kind, start + k * step, row, 0, 0, 0, 0, 0, 0, 0, 0)


def _teacher(teacher: Tensor | Rows) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors of a teacher, and the fields of its record from `kind` to `tail_stride`."""
    if isinstance(teacher, Int8Rows):
        q, affine = _row_major(teacher.q), teacher.affine.contiguous()
        fields = (call.INT8, q.data_ptr(), q.stride(0), affine.data_ptr(), 2, 0, 0, 0, 0, 0, 0)
        return [q, affine], fields
    if isinstance(teacher, TopKRows):
        ids, values = teacher.ids.contiguous(), teacher.values.contiguous()
        tail, kept = teacher.tail.contiguous(), teacher.ids.shape[1]
        return [ids, values, tail], (
            call.TOPK,
            values.data_ptr(),
            kept,
            0,
            0,
            ids.data_ptr(),
            kept,
            ids.element_size(),
            kept,
            tail.data_ptr(),
            tail.shape[1],
        )
    dense = teacher.values if isinstance(teacher, DenseRows) else teacher
    assert isinstance(dense, Tensor)
    dense = _row_major(dense)
    return [dense], (KINDS[dense.dtype], dense.data_ptr(), dense.stride(0), 0, 0, 0, 0, 0, 0, 0, 0)


def _scratch(size: int) -> Tensor:
    """Float32 to work in, kept for the next call of this thread unless it is large."""
    kept: Tensor | None = getattr(_room, "scratch", None)
    if kept is not None and len(kept) >= size:
        return kept
    scratch = torch.empty(size)
    if size <= _LARGEST_KEPT:
        _room.scratch = scratch
    return scratch


def _explain(request: Request, row: int) -> None:
    """Raise the error that the checks in torch have for a bad value."""
    spell_out(request)
    full_weights(request)
    for teacher in request.teachers:
        if isinstance(teacher, TopKRows):
            teacher.decode()
    raise RuntimeError(f"the compiled loss refused row {row}, and the checks in torch did not")
