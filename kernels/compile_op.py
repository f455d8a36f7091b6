"""The compiled loss as a torch operator for `torch.compile`.

Eager calls use an autograd Function instead, whose overhead is a third of an operator's. A compiled graph may
run its backward on copies, so the gradient is scaled out of place here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coursepack.kernels.cpu import native
from coursepack.kernels.int4 import Int4Rows
from coursepack.kernels.labels import MixedLabels
from coursepack.kernels.packed import PackedTopKRows
from coursepack.kernels.rows import DenseRows, Int8Rows, TopKRows
from coursepack.kernels.spec import LossCall, LossSpec

if TYPE_CHECKING:
    from coursepack.kernels.rows import Rows

SCHEMA = (
    "(Tensor student_logits, Tensor? weights, Tensor[] parts, int[] marks, Tensor?[] labels, "
    "Tensor?[] temperatures, float[] fixed_temperatures, Tensor? row_weight, str names, float[] numbers, "
    "int ignore_index, bool wants_student, bool wants_weights) -> (Tensor, Tensor, Tensor)"
)


def _compute(
    student_logits: Tensor,
    weights: Tensor | None,
    parts: list[Tensor],
    marks: list[int],
    labels: list[Tensor | None],
    temperatures: list[Tensor | None],
    fixed_temperatures: list[float],
    row_weight: Tensor | None,
    names: str,
    numbers: list[float],
    ignore_index: int,
    wants_student: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rebuild the call that `call_op` flattened and run `native.evaluate`."""
    temperature, *own = (
        number if each is None else each
        for each, number in zip(temperatures, fixed_temperatures, strict=True)
    )
    divergence, combine, *adjustments = names.split()
    smoothing, soft_weight, hard_weight = numbers
    first, second, lam = labels
    own_labels: Tensor | MixedLabels | None = first
    if first is not None and second is not None and lam is not None:
        own_labels = MixedLabels(first, second, lam)
    call = LossCall(
        spec=LossSpec(
            temperature=temperature,
            smoothing=smoothing,
            divergence=divergence,
            combine=combine,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            row_weight=row_weight,
            ignore_index=ignore_index,
        ),
        teachers=_rows(parts, marks, student_logits.shape[1]),
        labels=own_labels,
        weights=weights,
        teacher_temperatures=own or None,
        adjustments=tuple(adjustments),
        teacher_count=len(adjustments),
        rows=student_logits.shape[0],
        classes=student_logits.shape[1],
        device=student_logits.device,
        dtype=torch.float32,
    )
    loss, grad, grad_weights = native.evaluate(call, student_logits, weights, wants_student, wants_weights)
    none = student_logits.new_empty(0)
    return loss, none if grad is None else grad, none.clone() if grad_weights is None else grad_weights


compute = torch.library.custom_op("coursepack::soft_target_loss", _compute, mutates_args=(), schema=SCHEMA)
"""Operator that returns the loss `(N,)` and its gradients; a gradient that is not needed is empty."""


@compute.register_fake
def _(student_logits: Tensor, weights: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wants_student, wants_weights = rest[-2:]
    loss = student_logits.new_empty(student_logits.shape[0], dtype=torch.float32)
    none = student_logits.new_empty(0)
    grad = student_logits.new_empty(student_logits.shape) if wants_student else none
    grad_weights = none.clone()
    if wants_weights and weights is not None:
        grad_weights = weights.new_empty(weights.shape)
    return loss, grad, grad_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad, grad_weights = output
    ctx.mark_non_differentiable(grad, grad_weights)
    ctx.save_for_backward(grad, grad_weights)
    ctx.wanted = inputs[-2:]
    # A list of tensors (and an empty one counts) has a list of gradients, other lists have none.
    ctx.others = [
        [None] * len(each)
        if isinstance(each, list) and all(isinstance(one, Tensor) for one in each)
        else None
        for each in inputs[2:]
    ]


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
    scaled = [
        gradient * grad_loss[:, None].to(gradient.dtype) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*scaled, *ctx.others)


compute.register_autograd(_backward, setup_context=_setup_context)


def call_op(student_logits: Tensor, call: LossCall) -> Tensor:
    """Compute `soft_target_loss` of a checked call through the operator."""
    spec, labels, weights = call.spec, call.labels, call.wide_weights
    parts, marks = _parts(call.teacher_list)
    ids = (
        (labels.first, labels.second, labels.lam) if isinstance(labels, MixedLabels) else (labels, None, None)
    )
    temperatures = [spec.temperature, *(call.teacher_temperatures or ())]
    loss, _, _ = compute(
        student_logits,
        weights,
        parts,
        marks,
        list(ids),
        [each if isinstance(each, Tensor) else None for each in temperatures],
        [1.0 if isinstance(each, Tensor) else float(each) for each in temperatures],
        spec.row_weight,
        " ".join((spec.divergence, spec.combine, *call.adjustments)),
        [float(spec.smoothing), float(spec.soft_weight), float(spec.hard_weight)],
        spec.ignore_index,
        _wants(student_logits),
        _wants(weights),
    )
    result: Tensor = loss
    return result


def _wants(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _parts(teachers: list[Tensor | Rows]) -> tuple[list[Tensor], list[int]]:
    """Flatten teachers to tensors and a mark for each tensor.

    The mark is -1 for a dense teacher, -2 and -3 for the first tensor of int8 and int4 rows, C for the first
    of top-k rows, -3 - k for the first of packed rows of k entries, and 0 for a tensor that belongs to the
    teacher before it.
    """
    parts: list[Tensor] = []
    marks: list[int] = []
    for teacher in teachers:
        if isinstance(teacher, Int8Rows):
            parts += [teacher.q, teacher.affine]
            marks += [-2, 0]
        elif isinstance(teacher, Int4Rows):
            parts += [teacher.q, teacher.scale]
            marks += [-3, 0]
        elif isinstance(teacher, TopKRows):
            parts += [teacher.ids, teacher.values, teacher.tail]
            marks += [teacher.classes, 0, 0]
        elif isinstance(teacher, PackedTopKRows):
            parts += [teacher.entries, teacher.scale]
            marks += [-3 - teacher.kept, 0]
        else:
            values = teacher.values if isinstance(teacher, DenseRows) else teacher
            assert isinstance(values, Tensor)
            parts.append(values.detach())
            marks.append(-1)
    return parts, marks


def _rows(parts: list[Tensor], marks: list[int], classes: int) -> list[Tensor | Rows]:
    """Rebuild the teachers that `_parts` flattened, of so many classes."""
    teachers: list[Tensor | Rows] = []
    for index, mark in enumerate(marks):
        if mark == -1:
            teachers.append(parts[index])
        elif mark == -2:
            teachers.append(Int8Rows(parts[index], parts[index + 1]))
        elif mark == -3:
            teachers.append(Int4Rows(parts[index], parts[index + 1], classes))
        elif mark < 0:
            teachers.append(PackedTopKRows(parts[index], parts[index + 1], -3 - mark, classes))
        elif mark > 0:
            teachers.append(TopKRows(parts[index], parts[index + 1], parts[index + 2], mark))
    return teachers
