"""Losses between pairs of features: a teacher's tap and one or two layers of the student.

With several pairs, a loss is summed over the pairs and averaged over the teachers, with equal weights, so
that two copies of a teacher count as one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursepack.distill.losses.base import PairChoice, TermConfig, Unfit
from coursepack.kernels import decode
from coursepack.models import reductions
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coursepack.distill.losses.base import FeaturePair, LossInputs


class PairsConfig(TermConfig):
    """Base class of the configs of losses between pairs of features."""

    pairs: tuple[PairChoice, ...] = ()
    """Pairs of taps and student layers to compare; by default, the term chooses them by depth."""
    layers: tuple[str, ...] = ()
    """Student layers to choose from, shallow to deep; defaults to all blocks."""


class PairLoss(nn.Module):
    """Sum over pairs of a loss between features, averaged over teachers."""

    def __init__(
        self,
        pairs: Sequence[FeaturePair],
        compare: Callable[[Sequence[Tensor], Tensor, FeaturePair], Tensor],
    ) -> None:
        """Initialize the loss.

        Args:
            pairs: the pairs to compare.
            compare: function from the outputs of a pair's student layers, the teacher's features as stored
                and the pair to the loss: `(N,)`, or a scalar that couples the samples of a batch.
        """
        super().__init__()
        self.pairs = tuple(pairs)
        self.compare = compare
        self.teachers = len({pair.teacher for pair in pairs})

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss, with gradient to the student's layers."""
        losses = [
            self.compare(student_outputs(inputs, pair), teacher_features(inputs, pair), pair)
            for pair in self.pairs
        ]
        return torch.stack(losses).sum(0) / self.teachers


def teacher_features(inputs: LossInputs, pair: FeaturePair) -> Tensor:
    """Return a pair's features as the teacher's store holds them, `(N, ...)` float32, detached."""
    return decode(inputs.teachers.features_of(pair.teacher, pair.tap)).float().detach()


def student_outputs(inputs: LossInputs, pair: FeaturePair) -> list[Tensor]:
    """Return the outputs `(N, ...)` float32 of a pair's student layers."""
    return [inputs.student.features[layer].float() for layer in pair.layers]


def pooled_features(features: Tensor) -> Tensor:
    """Return vectors `(N, D)`: the means of maps over positions, and vectors as they are."""
    return features if features.ndim == 2 else features.flatten(2).mean(2)


def reduced_as(pair: FeaturePair, outputs: Sequence[Tensor]) -> Tensor:
    """Return the student's outputs reduced as the pair's tap reduces the teacher's, `(N, ...)`, not sketched.

    Vectors of the student stand for a tap's `pooled` features.
    """
    tap = replace(tap_from_name(pair.tap), sketch=None)
    if tap.reduction == "pooled":
        outputs = [output if output.ndim == 4 else output[..., None, None] for output in outputs]
    return tap.reduce(outputs, None)


def sketched_as(pair: FeaturePair, features: Tensor) -> Tensor:
    """Return features projected as the pair's tap projects the teacher's, or as they are if it does not."""
    width = tap_from_name(pair.tap).sketch
    return features if width is None else reductions.sketch(features, width)


def map_size(pair: FeaturePair) -> tuple[int, int]:
    """Return the height and width at which a pair's maps are compared: the smaller of both sides'.

    The maps of a teacher whose positions are stored in one axis are taken for square unless the student's map
    has as many positions.
    """
    height, width = pair.student_shape[1:]
    if tap_from_name(pair.tap).reduction == "map":
        return min(height, pair.teacher_shape[1]), min(width, pair.teacher_shape[2])
    positions = pair.teacher_shape[0]
    side = math.isqrt(positions)
    return (height, width) if height * width == positions else (side, side)


def resized_to(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps average-pooled to a height and width."""
    return features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)


def unfit_size(pair: FeaturePair) -> Unfit | None:
    """Return why a pair cannot be compared if its tap resizes maps, but the student's layer gives vectors."""
    tap = tap_from_name(pair.tap)
    if tap.size is None or len(pair.student_shape) == 3:
        return None
    return Unfit("the student's layer gives vectors", replace(tap, size=None).text)


def unfit_maps(pair: FeaturePair) -> Unfit | None:
    """Return why maps cannot be compared position by position, and the tap that can be."""
    tap = tap_from_name(pair.tap)
    if len(pair.student_shape) != 3 or len(pair.layers) != 1:
        return Unfit(
            "it takes one layer of the student that gives maps (C, H, W): name another with `layers`"
        )
    if tap.reduction == "map":
        maps = len(pair.teacher_shape) == 3
        return None if maps else Unfit("it takes maps (C, H, W) of the teacher: tap another layer")
    if len(tap.layers) != 1:
        return Unfit("it takes the matrix of one layer", replace(tap, layers=tap.layers[-1:]).text)
    height, width = pair.student_shape[1:]
    positions, side = pair.teacher_shape[0], math.isqrt(pair.teacher_shape[0])
    if positions == height * width or (side**2 == positions and side <= min(height, width)):
        return None
    return Unfit(
        f"the teacher's {positions} positions cannot be compared with the student's {height} x {width}",
        replace(tap, size=min(height, width)).text,
    )
