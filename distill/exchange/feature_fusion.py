"""Feature fusion: a classifier on all students' joined maps, which teaches the students and learns from them.

FFL: Kim, Hyun, Chung and Kwak 2020, ICPR, arXiv 1904.09058, equations 2 to 7; details as in its release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.exchange.base import Exchange, ExchangeConfig, Exchanged, ExchangeInputs, GroupContext
from coursepack.distill.losses.base import Needs
from coursepack.distill.losses.label import cross_entropy
from coursepack.distill.schedule import Weight, value_at
from coursepack.errors import RecipeError
from coursepack.kernels import soft_target_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.exchange.base import MemberShapes
    from coursepack.distill.losses.base import StudentOutput


class FeatureFusionConfig(ExchangeConfig):
    """Config of the fused classifier."""

    name: Literal["feature_fusion"] = "feature_fusion"
    weight: Weight = 1.0
    """Weight of the divergence of the fused classifier from the mean of the students' logits."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 3.0
    """Temperature of this divergence."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    """Weight decay of the fused classifier."""


class FeatureFusion(nn.Module):
    """Classifier on joined maps: depthwise 3x3 and 1x1 convolutions, pooling, and a linear layer."""

    def __init__(self, config: FeatureFusionConfig, students: Sequence[MemberShapes], classes: int) -> None:
        super().__init__()
        self.config = config
        self.layers = tuple(student.last_map for student in students)
        channels = [student.map_shape[0] for student in students]
        joined, width = sum(channels), channels[0]
        self.depthwise = nn.Conv2d(joined, joined, 3, padding=1, groups=joined, bias=False)
        self.norm1 = nn.BatchNorm2d(joined)
        self.pointwise = nn.Conv2d(joined, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the fused logits, detached, for every student, and the losses of the fused classifier."""
        config, count = self.config, len(inputs.outputs)
        fused = self.ensembles(inputs.outputs)["fused"]
        mean = torch.stack([output.logits.detach() for output in inputs.outputs]).mean(0)
        divergence = soft_target_loss(fused, [mean], temperature=config.temperature, reduction="mean")
        losses = {
            "fused_cross_entropy": cross_entropy(fused, inputs.labels).mean(),
            "fused_divergence": value_at(config.weight, inputs.step.epoch) * divergence,
        }
        return Exchanged(((fused.detach(),),) * count, (losses, *({} for _ in range(count - 1))))

    def ensembles(self, outputs: Sequence[StudentOutput]) -> dict[str, Tensor]:
        """Return the fused classifier's logits `(N, C)`."""
        maps = [output.features[layer] for output, layer in zip(outputs, self.layers, strict=True)]
        hidden = self.norm1(self.depthwise(torch.cat(maps, 1))).relu()
        hidden = self.norm2(self.pointwise(hidden)).relu()
        return {"fused": self.head(hidden.mean((2, 3)))}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the fused classifier's parameters with their own weight decay."""
        return [{"params": list(self.parameters()), "weight_decay": self.config.weight_decay}]


def _needs(_config: FeatureFusionConfig) -> Needs:
    return Needs(labels=True, whole_batch=("batch normalization of exchange 'feature_fusion'",))


def _build(config: FeatureFusionConfig, context: GroupContext) -> FeatureFusion:
    shapes = [student.map_shape for student in context.students]
    if len({shape[1:] for shape in shapes}) > 1:
        raise RecipeError(
            "exchange 'feature_fusion' joins the students' last maps, which are "
            f"{', '.join(' x '.join(map(str, shape)) for shape in shapes)} (C x H x W), expected one height "
            "and width: choose networks of one kind, or --method one, which reads embeddings"
        )
    return FeatureFusion(config, context.students, context.classes)


EXCHANGE = Exchange(
    config=FeatureFusionConfig,
    formula="z_f of a classifier on all students' last maps, detached; and CE(z_f, y) + weight T² "
    "KL(mean_i z_i || z_f)",
    source="Kim, Hyun, Chung and Kwak 2020 (FFL), arXiv 1904.09058, equations 2 to 7",
    needs=_needs,
    build=_build,
    layers="last map",
    joint="the losses of the fused classifier train all students",
)
