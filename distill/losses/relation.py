"""Relational knowledge distillation (RKD): angles and distances between the samples of a batch.

Park et al., CVPR 2019, arXiv 1904.05068, equations 5 to 8, compare embeddings of teacher and student
(`compare: features`). AMTML-KD (Liu et al. 2020, arXiv 2103.04062) compares outputs, with the fused soft
targets as the teacher (`compare: outputs`). Both losses are scalars that couple the samples of a batch,
computed in float32 or float64, with gradient to the student only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, PairNeeds
from coursepack.distill.losses.pairs import PairLoss, PairsConfig, pooled_features
from coursepack.kernels.angles import angle_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from coursepack.distill.losses.base import FeaturePair


class RelationConfig(PairsConfig):
    """Base class of the configs of relation losses."""

    compare: Literal["outputs", "features"] = "outputs"
    """What is compared: the student's output with the fused targets, or the pooled features of `pairs`."""
    student: Literal["probs", "log_probs", "logits"] = "probs"
    """Form of the student's output, at the objective's temperature, that is compared with the fused targets.
    With `probs`, a student with the teachers' outputs has loss zero; AMTML-KD's notebooks use the others."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.compare == "outputs" and (self.pairs or self.layers):
            raise ValueError(
                "pairs and layers are of features, but compare is outputs: give compare=features"
            )
        if self.compare == "features" and self.student != "probs":
            raise ValueError(f"student is {self.student!r}, a form of outputs, but compare is features")
        return self


class AngleConfig(RelationConfig):
    """Config of the angle loss."""

    term: Literal["angle"] = "angle"


class DistanceConfig(RelationConfig):
    """Config of the distance loss."""

    term: Literal["distance"] = "distance"


class Relation(nn.Module):
    """Relation loss between the student's outputs and the fused targets."""

    def __init__(self, config: RelationConfig, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.config = config
        self.loss = loss

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss, a scalar over the whole batch, with gradient to the student's logits."""
        soft, key = inputs.soft, f"student {self.config.student}"
        if key not in inputs.shared:
            inputs.shared[key] = student_embedding(
                soft.comparable(inputs.student.logits), self.config.student, soft.temperature
            )
        return self.loss(inputs.shared[key], soft.probs)


def student_embedding(student_logits: Tensor, kind: str, temperature: Tensor | float) -> Tensor:
    """Return the student's output `(N, C)` in a form of `RelationConfig.student`, float32 or float64."""
    wide = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    return {
        "probs": lambda: (wide / temperature).softmax(1),
        "log_probs": lambda: (wide / temperature).log_softmax(1),
        "logits": lambda: wide,
    }[kind]()


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all pairs of SmoothL1(d_student - d_teacher), a scalar.

    Distances are divided by their mean over all pairs of different samples, including pairs at distance 0,
    as in the releases.

    Args:
        student: points `(N, C)`, which receive the gradient.
        teacher: points `(N, C')`; detached.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(_distances(student), _distances(teacher.detach()))


def _distances(embedding: Tensor) -> Tensor:
    # Differences and not products: a² + b² - 2ab cancels where samples are close.
    distances = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")
    rows = len(embedding)
    mean = distances.sum() / max(rows * (rows - 1), 1)
    return distances / mean.clamp_min(1e-12)


def _needs(config: RelationConfig) -> Needs:
    if config.compare == "outputs":
        return Needs(fused=True, whole_batch=(config.term,))
    pairs = PairNeeds(config.pairs, config.layers, ("pooled", "map"), choose="last")
    return Needs(pairs=pairs, whole_batch=(config.term,), every_teacher="relations of embeddings")


def _build_angle(config: AngleConfig, context: BuildContext) -> nn.Module:
    return _build(config, context, angle_loss)


def _build_distance(config: DistanceConfig, context: BuildContext) -> nn.Module:
    return _build(config, context, distance_loss)


def _build(
    config: RelationConfig, context: BuildContext, loss: Callable[[Tensor, Tensor], Tensor]
) -> nn.Module:
    if config.compare == "outputs":
        return Relation(config, loss)

    def compared(outputs: Sequence[Tensor], teacher: Tensor, _pair: FeaturePair) -> Tensor:
        return loss(pooled_features(outputs[0]), pooled_features(teacher))

    return PairLoss(context.pairs, compared)


_PARK = "Park et al. 2019 (RKD), arXiv 1904.05068"
ANGLE = Loss(
    config=AngleConfig,
    formula="mean over triples of SmoothL1(cos angle_ijk(q) - cos angle_ijk(sum_k w_k P_k))",
    source=f"{_PARK}, equations 7 and 8",
    needs=_needs,
    build=_build_angle,
)
DISTANCE = Loss(
    config=DistanceConfig,
    formula="mean over pairs of SmoothL1(d_ij(q) - d_ij(sum_k w_k P_k)), distances divided by their mean",
    source=f"{_PARK}, equations 5 and 6",
    needs=_needs,
    build=_build_distance,
)
