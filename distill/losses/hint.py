"""Hints: teachers' features as targets of the student's, through one learnable adapter each.

Romero et al., ICLR 2015, arXiv 1412.6550, equation 3 (FitNets); with several teachers, each guiding one group
of the student's layers, Liu et al. 2020, arXiv 2103.04062, section 3.4 (AMTML-KD). The paper leaves open
which teacher guides which group: here teachers, in the order of the stores, go from shallow to deep. The
teacher's features are taken as they are, so its adapter ends without an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coursepack.config import Config
from coursepack.distill.schedule import Weight
from coursepack.kernels import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.losses.base import Facts


class HintConfig(Config):
    """One teacher's layer that guides one of the student's."""

    teacher: Annotated[int, Field(ge=0)]
    """Place of its store."""
    tap: str
    """LAYER[:REDUCTION[:SIZE]] in its store, with the reductions map and pooled."""
    layer: str
    """The student's layer."""


class HintsConfig(Config):
    """Weights and assignment of the hints."""

    weight: Weight = 0.0
    """Factor of the sum over the pairs' mean squared errors."""
    pairs: tuple[HintConfig, ...] = ()
    """Who guides what; empty means every teacher one layer, by depth."""
    layers: tuple[str, ...] = ()
    """The student's groups, shallow to deep, for the assignment by depth; empty means all its blocks."""


@dataclass(frozen=True)
class Hint:
    """A pair with the shapes of one sample's features."""

    teacher: int
    tap: str
    """Its name in the store."""
    layer: str
    teacher_shape: tuple[int, ...]
    student_shape: tuple[int, ...]


class Adapter(nn.Module):
    """From a student's features to the form of a teacher's.

    Maps are averaged (or repeated) to the teacher's height and width first; a 1x1 convolution then changes
    the channels. Where one side has no places, the other's are averaged away, and it is a linear map.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        maps = len(student_shape) == len(teacher_shape) == 3
        self.size = (teacher_shape[1], teacher_shape[2]) if maps else None
        kind = nn.Linear if self.size is None else _pointwise
        self.change = kind(student_shape[0], teacher_shape[0])

    def forward(self, features: Tensor) -> Tensor:
        """`(N, D)` or `(N, C, H, W)`, as `like` makes of the teacher's."""
        features = features.float()
        if self.size is not None:
            features = F.adaptive_avg_pool2d(features, self.size)
        changed: Tensor = self.change(_without_places(features) if self.size is None else features)
        return changed

    def like(self, teacher_features: Tensor) -> Tensor:
        """The teacher's features in the form of the adapter's output."""
        return teacher_features if self.size is not None else _without_places(teacher_features)


def _pointwise(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1)


def _without_places(features: Tensor) -> Tensor:
    return features if features.ndim == 2 else features.flatten(2).mean(2)


class Hints(nn.Module):
    """The sum over pairs of each one's mean squared error, per sample."""

    def __init__(self, hints: Sequence[Hint], *, seed: int = 0) -> None:
        super().__init__()
        self.hints = tuple(hints)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.adapters = nn.ModuleList(Adapter(h.student_shape, h.teacher_shape) for h in hints)

    def forward(self, facts: Facts) -> Tensor:
        """Loss `(N,)`; gradient to the student's features and the adapters."""
        total = torch.zeros_like(facts.student_logits[:, 0], dtype=torch.float32)
        for hint, adapter in zip(self.hints, self.adapters, strict=True):
            assert isinstance(adapter, Adapter)
            theirs = adapter.like(decode(facts.teachers.features_of(hint.teacher, hint.tap)).float())
            error = adapter(facts.inside.features[hint.layer]) - theirs.detach()
            total = total + error.square().flatten(1).mean(1)
        return total


def depth_group(teacher: int, teachers: int, groups: int) -> int:
    """The student's group that a teacher guides: teachers are spread evenly from shallow to deep.

    One teacher guides the middle, as in FitNets.

    >>> [depth_group(teacher, 3, 4) for teacher in range(3)]
    [0, 2, 3]
    """
    if teachers == 1:
        return (groups - 1) // 2
    return (2 * teacher * (groups - 1) + teachers - 1) // (2 * (teachers - 1))
