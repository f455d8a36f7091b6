"""The angle loss of relational distillation over all triples of a batch: its definition, and compiled.

With psi_ijk the cosine of the angle at j between i and k, the loss is the mean of SmoothL1(psi - psi') over
all N³ triples (Park et al., CVPR 2019, arXiv 1904.05068, equations 7 and 8). It is exact on every path. On
the CPU a compiled pass over the N (N - 1) (N - 2) / 6 triangles computes loss and gradient at once from the
distances in float64, in O(N²) memory; elsewhere chunks of anchors are computed in torch operations, and again
in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from coursepack.kernels import dispatch
from coursepack.kernels.rows import is_eager_cpu

CHUNK_BYTES = 32 << 20
"""Memory for one chunk of angles and its backward pass; a chunk has at least one anchor."""
SAME = 1e-12
"""Distance up to which points count as the same, as in `torch.nn.functional.normalize`."""


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all triples of SmoothL1(psi_student - psi_teacher), a scalar.

    psi_ijk is the cosine of the angle at j between i and k, and 0 if j is the same point as one of them.

    Args:
        student: points `(N, C)` float32 or float64, which receive the gradient.
        teacher: points `(N, C')`; detached.
    """
    if not (is_eager_cpu(student.device) and dispatch.NUMBA_IS_INSTALLED):
        return chunked_angle_loss(student, teacher)
    loss: Tensor = _AngleLoss.apply(student, teacher)
    return loss


class _AngleLoss(torch.autograd.Function):
    """Autograd Function that computes the gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        loss, gradient = _evaluate(student.detach().double(), teacher.detach().double())
        ctx.save_for_backward(gradient.to(student.dtype))
        return loss.to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None


def _evaluate(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient with respect to the student's points, all float64."""
    from coursepack.kernels.cpu.jit_angles import LOT, triangle_sum

    count = len(student)
    width = -(-count // LOT) * LOT
    ours, theirs = _distances(student, width), _distances(teacher, width)
    slopes = student.new_zeros(count, width)
    held = (*ours, *theirs, slopes)
    total = triangle_sum(count, width, *(matrix.data_ptr() for matrix in held))
    # The slopes with respect to squared distances, of which |x_i - x_j|² has the slope 2 (x_i - x_j).
    slopes = slopes[:, :count]
    slopes = slopes + slopes.T
    gradient = slopes.sum(1, keepdim=True) * student - slopes @ student
    # A side that only one of them has: the angle between it and itself is 0 for one of them.
    one_sided = int(((ours[1] == 0) != (theirs[1] == 0)).sum())
    # Both orders of i and k have the same angle.
    mean = (2 * total + 0.5 * one_sided) / count**3
    return student.new_tensor(mean), gradient.mul_(4 / count**3)


def _distances(points: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return squared distances D and `1 / sqrt(2 D)`, 0 for same points, with rows padded by zeros."""
    from coursepack.kernels.cpu.jit_angles import write_distances

    points = points.contiguous()
    squares = points.new_zeros(len(points), width)
    write_distances(points.data_ptr(), *points.shape, squares.data_ptr(), width)
    return squares, torch.where(squares <= SAME**2, 0.0, (2 * squares).rsqrt())


def chunked_angle_loss(student: Tensor, teacher: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Return `angle_loss` computed in torch operations, the definition of the compiled one.

    Args:
        student: points `(N, C)`, which receive the gradient.
        teacher: points `(N, C')`; detached.
        chunk_bytes: memory limit for one chunk of angles; affects results only by rounding.
    """
    rows, width = len(student), max(student.shape[1], teacher.shape[1])
    anchors = max(1, chunk_bytes // (student.element_size() * rows * 8 * (rows + width)))
    total = student.new_zeros(())
    for start in range(0, rows, anchors):
        chunk_sum = checkpoint(
            _angle_sum,
            student,
            teacher.detach(),
            start,
            start + anchors,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        assert isinstance(chunk_sum, Tensor)
        total = total + chunk_sum
    return total / rows**3


def _angle_sum(student: Tensor, teacher: Tensor, start: int, stop: int) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        targets = _angles(teacher, start, stop)
        return F.smooth_l1_loss(_angles(student, start, stop), targets, reduction="sum")


def _angles(embedding: Tensor, start: int, stop: int) -> Tensor:
    """Return the cosines `(anchors, N, N)` of the angles at a range of anchors."""
    sides = F.normalize(embedding[None] - embedding[start:stop, None], dim=2)
    return sides @ sides.transpose(1, 2)
