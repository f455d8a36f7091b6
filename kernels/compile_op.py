"""The compiled loss as a torch operator, which `torch.compile` can put into a graph.

Eager calls do without it: an autograd Function costs a third of an operator's bookkeeping. A graph may run
its backward from copies, so here the gradient is scaled out of place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coursepack.kernels.cpu import native
from coursepack.kernels.labels import MixedLabels
from coursepack.kernels.rows import DenseRows, Int8Rows, TopKRows
from coursepack.kernels.spec import Request

if TYPE_CHECKING:
    from coursepack.kernels.rows import Rows

SCHEMA = (
    "(Tensor student_logits, Tensor? weights, Tensor[] parts, int[] classes_of_parts, Tensor? first, "
    "Tensor? second, Tensor? lam, Tensor? temperature, float fixed_temperature, "
    "Tensor?[] teacher_temperatures, float[] fixed_teacher_temperatures, str adjustments, float smoothing, "
    "str divergence, str combine, float soft_weight, float hard_weight, Tensor? row_weight, "
    "int ignore_index, bool wants_student, bool wants_weights) -> (Tensor, Tensor, Tensor)"
)


def _compute(
    student_logits: Tensor,
    weights: Tensor | None,
    parts: list[Tensor],
    classes_of_parts: list[int],
    first: Tensor | None,
    second: Tensor | None,
    lam: Tensor | None,
    temperature: Tensor | None,
    fixed_temperature: float,
    teacher_temperatures: list[Tensor | None],
    fixed_teacher_temperatures: list[float],
    adjustments: str,
    smoothing: float,
    divergence: str,
    combine: str,
    soft_weight: float,
    hard_weight: float,
    row_weight: Tensor | None,
    ignore_index: int,
    wants_student: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    own: list[float | Tensor] = [
        number if each is None else each
        for each, number in zip(teacher_temperatures, fixed_teacher_temperatures, strict=True)
    ]
    labels = first
    request = Request(
        given=_rows(parts, classes_of_parts),
        labels=labels if second is None or lam is None or first is None else MixedLabels(first, second, lam),
        weights=weights,
        temperature=fixed_temperature if temperature is None else temperature,
        teacher_temperatures=own or None,
        adjustments=tuple(adjustments.split()),
        smoothing=smoothing,
        divergence=divergence,
        combine=combine,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        row_weight=row_weight,
        ignore_index=ignore_index,
        count=len(adjustments.split()),
        rows=student_logits.shape[0],
        classes=student_logits.shape[1],
        device=student_logits.device,
        dtype=torch.float32,
    )
    loss, grad, grad_weights = native.evaluate(student_logits, weights, request, wants_student, wants_weights)
    none = student_logits.new_empty(0)
    return loss, none if grad is None else grad, none.clone() if grad_weights is None else grad_weights


compute = torch.library.custom_op("coursepack::soft_target_loss", _compute, mutates_args=(), schema=SCHEMA)
"""Loss `(N,)` and the gradients of its sum, `(0,)` where not wanted."""


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


def call(student_logits: Tensor, request: Request) -> Tensor:
    """`soft_target_loss` of a request through the operator."""
    r = request
    labels, temperature = r.labels, r.temperature
    mixed = labels if isinstance(labels, MixedLabels) else None
    own = r.teacher_temperatures or []
    weights = None if r.weights is None else r.weights.expand(r.rows, r.count)
    parts, classes_of_parts = _parts(r.teachers)
    loss, _, _ = compute(
        student_logits,
        weights,
        parts,
        classes_of_parts,
        labels if mixed is None else mixed.first,
        None if mixed is None else mixed.second,
        None if mixed is None else mixed.lam,
        temperature if isinstance(temperature, Tensor) else None,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        [each if isinstance(each, Tensor) else None for each in own],
        [1.0 if isinstance(each, Tensor) else float(each) for each in own],
        " ".join(r.adjustments),
        float(r.smoothing),
        r.divergence,
        r.combine,
        float(r.soft_weight),
        float(r.hard_weight),
        r.row_weight,
        r.ignore_index,
        _wants(student_logits),
        _wants(weights),
    )
    result: Tensor = loss
    return result


def _wants(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _parts(teachers: list[Tensor | Rows]) -> tuple[list[Tensor], list[int]]:
    """Teachers as tensors, and for each tensor: -1 if it is a dense teacher, 0 if it goes on with the one
    before, -2 at the start of int8 rows, C at the start of top-k rows."""
    parts: list[Tensor] = []
    marks: list[int] = []
    for teacher in teachers:
        if isinstance(teacher, Int8Rows):
            parts += [teacher.q, teacher.affine]
            marks += [-2, 0]
        elif isinstance(teacher, TopKRows):
            parts += [teacher.ids, teacher.values, teacher.tail]
            marks += [teacher.classes, 0, 0]
        else:
            values = teacher.values if isinstance(teacher, DenseRows) else teacher
            assert isinstance(values, Tensor)
            parts.append(values.detach())
            marks.append(-1)
    return parts, marks


def _rows(parts: list[Tensor], marks: list[int]) -> list[Tensor | Rows]:
    """The teachers that `_parts` took apart."""
    teachers: list[Tensor | Rows] = []
    for place, mark in enumerate(marks):
        if mark == -1:
            teachers.append(parts[place])
        elif mark == -2:
            teachers.append(Int8Rows(parts[place], parts[place + 1]))
        elif mark > 0:
            teachers.append(TopKRows(parts[place], parts[place + 1], parts[place + 2], mark))
    return teachers
