"""Statistics of teacher logits per sample, for adaptive weights and dynamic temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coursepack.kernels import dispatch
from coursepack.kernels.cpu import native
from coursepack.kernels.reference import log_softmax
from coursepack.kernels.rows import decode
from coursepack.kernels.spec import LossSpec, check_call, check_teachers
from coursepack.kernels.values import BadRows, class_ids

if TYPE_CHECKING:
    from torch import Tensor

    from coursepack.kernels.spec import Teachers


@dataclass(frozen=True)
class TeacherStats:
    """Statistics per teacher and sample, all `(K, N)`, at temperature 1, without gradient."""

    argmax: Tensor
    """Top class, int64; ties go to the lowest class."""
    entropy: Tensor
    """Entropy of the teacher's probabilities, float32, nats."""
    norm: Tensor
    """Euclidean norm of the logits, float32."""
    correct: Tensor | None
    """True if no class has a larger logit than the label; None without labels, False for an ignored one."""
    cross_entropy: Tensor | None
    """Cross-entropy to the label, float32, nats; None without labels. 0 for an ignored label."""
    cosine: Tensor | None
    """Cosine between the teacher's and the given logits, float32; None without `student_logits`."""


def teacher_stats(
    teachers: Teachers,
    labels: Tensor | None = None,
    *,
    student_logits: Tensor | None = None,
    ignore_index: int = -100,
) -> TeacherStats:
    """Compute statistics of each teacher's logits for each sample.

    Args:
        teachers: `(K, N, C)` logits, or a list of K tensors or encoded rows `(N, C)`.
        labels: class ids `(N,)` int64.
        student_logits: `(N, C)`, for the cosine.
        ignore_index: label of a row without a label.

    Raises:
        ValueError: shapes that do not fit, or a label outside the classes (on CUDA its cross-entropy is NaN
            and it is not correct).
        TypeError: labels that are not int64.
    """
    listed = check_teachers(teachers, None if student_logits is None else student_logits.shape)
    call = check_call(None, teachers, labels, LossSpec(ignore_index=ignore_index))
    if dispatch.reads_teachers(call) and dispatch.reads_student(student_logits):
        numbers, tops, correct = native.statistics(student_logits, call)
        return TeacherStats(
            argmax=tops,
            entropy=numbers[0],
            norm=numbers[1],
            correct=None if labels is None else correct,
            cross_entropy=None if labels is None else numbers[2],
            cosine=None if student_logits is None else numbers[3],
        )
    checked = None
    if labels is not None:
        bad = BadRows(call.rows, labels.device)
        checked = (*class_ids("labels", labels, call, bad), bad)
    each = [_one_teacher(decode(t).detach(), checked, student_logits) for t in listed]
    return TeacherStats(
        argmax=torch.stack([stats.argmax for stats in each]),
        entropy=torch.stack([stats.entropy for stats in each]),
        norm=torch.stack([stats.norm for stats in each]),
        correct=_stack([stats.correct for stats in each]),
        cross_entropy=_stack([stats.cross_entropy for stats in each]),
        cosine=_stack([stats.cosine for stats in each]),
    )


def _stack(columns: list[Tensor | None]) -> Tensor | None:
    known = [column for column in columns if column is not None]
    return torch.stack(known) if known else None


def _one_teacher(
    logits: Tensor, labels: tuple[Tensor, Tensor, BadRows] | None, student_logits: Tensor | None
) -> TeacherStats:
    """Compute the statistics of one teacher, each `(N,)`."""
    log_probs = log_softmax(logits)
    correct = cross_entropy = cosine = None
    if labels is not None:
        ids, valid, bad_rows = labels[0], labels[1], labels[2].mask
        valid = valid if bad_rows is None else valid & ~bad_rows
        correct = valid & (logits.gather(1, ids[:, None])[:, 0] >= logits.amax(1))
        cross_entropy = torch.where(valid, -log_probs.gather(1, ids[:, None])[:, 0], 0)
        if bad_rows is not None:
            cross_entropy = cross_entropy.masked_fill(bad_rows, float("nan"))
    if student_logits is not None:
        cosine = torch.cosine_similarity(logits, student_logits.detach().float(), dim=1)
    return TeacherStats(
        argmax=logits.argmax(1),
        entropy=torch.special.entr(log_probs.exp()).sum(1),
        norm=torch.linalg.vector_norm(logits, dim=1),
        correct=correct,
        cross_entropy=cross_entropy,
        cosine=cosine,
    )
