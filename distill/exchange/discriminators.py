"""Discriminators: students follow each other's logits, and learn maps that cannot be told from each other's.

AFD: Chung, Park, Kim and Kwak 2020, ICML, arXiv 2002.01775, equations 1 to 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from coursepack.distill.exchange.base import Exchange, ExchangeConfig, Exchanged, ExchangeInputs, GroupContext

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coursepack.distill.exchange.base import MemberShapes


class DiscriminatorsConfig(ExchangeConfig):
    """Config of the adversarial exchange of maps."""

    name: Literal["discriminators"] = "discriminators"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the students' adversarial losses."""
    second_lr_factor: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate of the adversarial step over that of the other step."""
    width: Annotated[int, Field(ge=1)] = 64
    """Channels inside of a discriminator."""


class MapDiscriminator(nn.Module):
    """Probability `(N,)` that a map is the other student's: two convolutions, pooling, and a sigmoid.

    A transfer layer maps a student's own maps to the other's channels where their numbers differ.
    """

    def __init__(self, own: int, other: int, width: int) -> None:
        super().__init__()
        self.transfer = nn.Identity() if own == other else nn.Conv2d(own, other, 1)
        self.layers = nn.Sequential(
            nn.Conv2d(other, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 1),
        )

    def forward(self, maps: Tensor, *, own: bool) -> Tensor:
        """Return the probabilities for a student's `own` maps, or for the other's."""
        probability: Tensor = self.layers(self.transfer(maps) if own else maps).sigmoid()
        return probability[:, 0]


class Discriminators(nn.Module):
    """One discriminator per student, in a ring: student i follows student i - 1, and the first the last."""

    def __init__(self, config: DiscriminatorsConfig, students: Sequence[MemberShapes]) -> None:
        super().__init__()
        self.config = config
        self.layers = tuple(student.last_map for student in students)
        channels = [student.map_shape[0] for student in students]
        self.members = nn.ModuleList(
            MapDiscriminator(own, channels[index - 1], config.width) for index, own in enumerate(channels)
        )

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the detached logits of student i - 1 for each student i."""
        logits = [output.logits.detach() for output in inputs.outputs]
        return Exchanged(tuple((logits[index - 1],) for index in range(len(logits))))

    def second_step(self, inputs: ExchangeInputs) -> tuple[Mapping[str, Tensor], ...]:
        """Return each student's adversarial loss; the discriminators' own stands with the first student.

        A discriminator sees detached maps, and a student a discriminator with fixed parameters.
        """
        maps = [output.features[layer] for output, layer in zip(inputs.outputs, self.layers, strict=True)]
        losses: list[dict[str, Tensor]] = []
        telling = []
        for index, (member, own) in enumerate(zip(self.members, maps, strict=True)):
            other = F.adaptive_avg_pool2d(maps[index - 1].detach(), (own.shape[2], own.shape[3]))
            telling.append(
                (1 - member(other, own=False)).square().mean()
                + member(own.detach(), own=True).square().mean()
            )
            fixed = {name: value.detach() for name, value in member.named_parameters()}
            fooled = functional_call(member, fixed, (own,), {"own": True})
            losses.append({"adversarial": self.config.weight * (1 - fooled).square().mean()})
        losses[0]["discriminators"] = sum(telling[1:], telling[0])
        return tuple(losses)


def _build(config: DiscriminatorsConfig, context: GroupContext) -> Discriminators:
    return Discriminators(config, context.students)


EXCHANGE = Exchange(
    config=DiscriminatorsConfig,
    formula="z_{i-1}, detached; then (1 - D_i(f_i))², and (1 - D_i(f_{i-1}))² + D_i(f_i)² for D_i",
    source="Chung, Park, Kim and Kwak 2020 (AFD), arXiv 2002.01775, equations 1 to 6",
    build=_build,
    layers="last map",
    joint="the adversarial losses are in a step of their own",
)
