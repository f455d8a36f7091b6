"""Reused teacher classifier (SimKD): the student's map is regressed to the teacher's, whose head classifies.

Chen, Mei, Zhang, Wang, Feng and Chen, CVPR 2022, arXiv 2203.14001. The student is wrapped: a projector of
three convolutions, each with batch normalization and ReLU, maps its last map to the teacher's, and the
teacher's frozen head, read from the store, classifies the mean over positions. The wrapped student is the
network that is trained, evaluated and saved. Maps of different sizes are compared at the smaller one. The
paper's variant with several teachers is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.losses.base import (
    BuildContext,
    FeaturePair,
    Loss,
    LossInputs,
    Needs,
    PairChoice,
    PairNeeds,
    TermConfig,
    WrapContext,
)
from coursepack.distill.losses.pairs import teacher_features
from coursepack.errors import RecipeError
from coursepack.models.hubs.projected import PROJECTOR, Projection, project

if TYPE_CHECKING:
    from coursepack.models import Network


class SimKDConfig(TermConfig):
    """Config of the reused teacher classifier."""

    term: Literal["simkd"] = "simkd"
    tap: str = ""
    """Teacher's map whose mean its head reads, as LAYER[:map:SIZE]; defaults to the last stored map."""
    layer: str = ""
    """Layer to project, as the student names it before it is wrapped; defaults to its last map."""
    factor: Annotated[int, Field(ge=1)] = 2
    """Divisor of the teacher's channels between the projector's convolutions."""


class SimKD(nn.Module):
    """Mean squared error between the projected student's map and the teacher's."""

    def __init__(self, pair: FeaturePair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student and its projector."""
        projected = inputs.student.features[self.pair.layer].float()
        target = teacher_features(inputs, self.pair)
        height, width = projected.shape[2:]
        error = projected - F.adaptive_avg_pool2d(target, (height, width))
        return error.square().flatten(1).mean(1)


def wrap(config: SimKDConfig, student: Network, context: WrapContext) -> Network:
    """Return a student with a projector and the teacher's head; its own head is removed in place.

    Raises:
        UnknownName: the student does not have the layer.
        RecipeError: the student's layer gives no map, or the teacher's head does not read the tapped map.
    """
    shapes = {name: context.shape_of(name) for name in ([config.layer] if config.layer else context.blocks)}
    layer = next((name for name in reversed(shapes) if len(shapes[name]) == 3), None)
    if layer is None:
        shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise RecipeError(
            f"simkd projects a map (C, H, W) of the student, but {student.spec!r} gives {shown}: name a "
            "layer with a map, --set objective.terms.simkd.layer=LAYER, or use a convolutional student"
        )
    features, teacher_shape = context.head_weight.shape[1], context.teacher_shape
    if len(teacher_shape) != 3 or teacher_shape[0] != features:
        raise RecipeError(
            f"simkd needs the teacher's map whose mean its head reads, ({features}, H, W), but tap "
            f"{context.tap!r} gives {teacher_shape}: name another, --set objective.terms.simkd.tap=LAYER, or "
            "use a teacher that averages its last map"
        )
    channels, *sides = shapes[layer]
    height, width = (min(own, other) for own, other in zip(sides, teacher_shape[1:], strict=True))
    projection = Projection(layer, (channels, height, width), max(1, features // config.factor), features)
    return project(student, projection, context.head_weight, context.head_bias, seed=context.seed)


def _needs(config: SimKDConfig) -> Needs:
    pairs = (PairChoice(teacher=0, tap=config.tap, layer=PROJECTOR),) if config.tap else ()
    return Needs(
        pairs=PairNeeds(pairs, reductions=("map",), choose="last"),
        every_teacher="reused classifiers",
        teacher_head="the reused classifier",
    )


def _build(_config: SimKDConfig, context: BuildContext) -> SimKD:
    return SimKD(context.pairs[0])


LOSS = Loss(
    config=SimKDConfig,
    formula="mean (projector(student's last map) - teacher's last map)²",
    source="Chen et al. 2022 (SimKD), arXiv 2203.14001, and its release",
    needs=_needs,
    build=_build,
    wrap=wrap,
)
