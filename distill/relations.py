"""Relations between the samples of a batch, compared between student and teachers (RKD).

Park et al., CVPR 2019, arXiv 1904.05068, equations 5 to 8; on outputs, with the integrated soft targets as
the teacher, in AMTML-KD (Liu et al. 2020, arXiv 2103.04062). Both losses are scalars coupled over the batch,
in float32 or better, with a gradient to the student alone. Angles are B³ numbers: they are computed in
chunks of anchors of bounded memory (or one by one, B (B + C) numbers each, where that is more), and once more
in the backward pass.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coursepack.config import Config
from coursepack.distill.schedule import Weight

CHUNK_BYTES = 32 << 20
"""Memory for one chunk of angles and what its backward pass keeps; a chunk has at least one anchor."""


class RelationsConfig(Config):
    """Weights of the relation losses."""

    angle: Weight = 0.0
    """Factor of the angle loss."""
    distance: Weight = 0.0
    """Factor of the distance loss."""
    student: Literal["probs", "log_probs", "logits"] = "probs"
    """What of the student is compared with the integrated soft targets, at the objective's temperature.
    With `probs` a student that equals its teachers has loss zero; AMTML-KD's notebooks take the others."""


def student_embedding(student_logits: Tensor, kind: str, temperature: Tensor | float) -> Tensor:
    """`(N, C)`, in float32 or better, of a kind in `RelationsConfig.student`."""
    wide = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    return {
        "probs": lambda: (wide / temperature).softmax(1),
        "log_probs": lambda: (wide / temperature).log_softmax(1),
        "logits": lambda: wide,
    }[kind]()


def angle_loss(student: Tensor, teacher: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Mean over all triples of SmoothL1(psi_student - psi_teacher), a scalar.

    psi_ijk is the cosine of the angle at j between i and k; it is 0 where two of them are equal.

    Args:
        student: `(N, C)`, receives the gradient.
        teacher: `(N, C)`, detached.
        chunk_bytes: most memory for angles at a time, if one anchor fits; changes no value beyond rounding.
    """
    rows = len(student)
    anchors = max(1, chunk_bytes // (student.element_size() * rows * 8 * (rows + student.shape[1])))
    total = student.new_zeros(())
    for start in range(0, rows, anchors):
        part = checkpoint(
            _angle_sum,
            student,
            teacher.detach(),
            start,
            start + anchors,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        assert isinstance(part, Tensor)
        total = total + part
    return total / rows**3


def _angle_sum(student: Tensor, teacher: Tensor, start: int, stop: int) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        theirs = _angles(teacher, start, stop)
        return F.smooth_l1_loss(_angles(student, start, stop), theirs, reduction="sum")


def _angles(embedding: Tensor, start: int, stop: int) -> Tensor:
    """Cosines `(anchors, N, N)` at some anchors."""
    sides = F.normalize(embedding[None] - embedding[start:stop, None], dim=2)
    return sides @ sides.transpose(1, 2)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all pairs of SmoothL1(d_student - d_teacher), a scalar.

    Distances are divided by their mean over the pairs of two different samples, those at distance 0 counted
    too, as in the releases. Arguments as `angle_loss`.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(_distances(student), _distances(teacher.detach()))


def _distances(embedding: Tensor) -> Tensor:
    # Differences and not products: a² + b² - 2ab cancels where samples are close.
    distances = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")
    rows = len(embedding)
    mean = distances.sum() / max(rows * (rows - 1), 1)
    return distances / mean.clamp_min(1e-12)
