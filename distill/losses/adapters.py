"""Learnable maps from a student's features to the shape of a teacher's, shared by several terms.

A vector counts as a map of one position. Between a map and a vector, the map is averaged over positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.losses.base import FeaturePair

Shape = tuple[int, int, int]
"""Channels, height and width."""


def map_shapes(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> tuple[Shape, Shape]:
    """Return the shapes in which two features are compared: both maps, or both of one position."""
    if len(student_shape) == len(teacher_shape) == 3:
        student, teacher = ((each[0], each[1], each[2]) for each in (student_shape, teacher_shape))
        return student, teacher
    return (student_shape[0], 1, 1), (teacher_shape[0], 1, 1)


def as_maps(features: Tensor, shape: Shape) -> Tensor:
    """Return features `(N, D)` or `(N, C, H, W)` as maps of a shape of `map_shapes`."""
    if features.ndim == 4 and shape[1:] == (1, 1):
        features = features.mean((2, 3))
    return features[:, :, None, None] if features.ndim == 2 else features


def check_both_maps_or_vectors(term: str, pairs: Sequence[FeaturePair], values: str) -> None:
    """Check that no pair compares a map with a vector, for terms whose targets cannot be averaged.

    Raises:
        RecipeError: a pair does.
    """
    for pair in pairs:
        if len(pair.student_shape) != len(pair.teacher_shape):
            raise RecipeError(
                f"term {term!r} compares {values} one by one, but tap {pair.tap!r} has shape "
                f"{pair.teacher_shape} and layer {pair.layer!r} of the student {pair.student_shape}: choose "
                f"a pair of maps or of vectors with --set objective.terms.{term}.pairs=[...]"
            )


def layer_factors(pairs: Sequence[FeaturePair]) -> list[float]:
    """Return the factor of each pair: 1 for a teacher's last pair, and half of the next one before it.

    Factors are divided by the number of teachers.
    """
    teachers = [pair.teacher for pair in pairs]
    later = (teachers[index + 1 :].count(teacher) for index, teacher in enumerate(teachers))
    return [2.0**-count / len(set(teachers)) for count in later]


class Regressor(nn.Module):
    """Convolution with batch normalization from student features to the shape of a teacher's.

    Maps of twice the teacher's size take a 3x3 convolution of stride 2, maps of half its size a transposed
    4x4 convolution of stride 2, and larger maps a kernel of the difference in size plus one, as in the
    release of Tian et al. 2020 (arXiv 1910.10699). Smaller maps of other sizes, which are not defined there,
    are first repeated by adaptive pooling.
    """

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        relu: bool = False,
        pointwise: bool = False,
    ) -> None:
        """Build the layers with newly initialized weights.

        Args:
            student_shape: shape of the student's features of one sample.
            teacher_shape: shape of the teacher's.
            relu: end in a ReLU; the teacher's features have to be nonnegative.
            pointwise: match sizes by adaptive average pooling and channels by a 1x1 convolution without bias,
                initialized with variance 2 / output channels, as in the release of Heo et al. 2019 (OFD).
        """
        super().__init__()
        self.relu = relu
        self.shape, target = map_shapes(student_shape, teacher_shape)
        self.vector_output = len(teacher_shape) == 1 or len(student_shape) == 1
        convolution = None if pointwise else _convolution(self.shape, target)
        self.resized = target[1:] if convolution is None else None
        if convolution is None:
            convolution = nn.Conv2d(self.shape[0], target[0], 1, bias=not pointwise)
        if pointwise:
            nn.init.normal_(convolution.weight, std=math.sqrt(2 / target[0]))
        self.conv = convolution
        self.norm = nn.BatchNorm2d(target[0])

    def forward(self, features: Tensor) -> Tensor:
        """Return adapted features, `(N, D)` or `(N, C, H, W)`, of the same shape as `like` returns."""
        maps = as_maps(features, self.shape)
        if self.resized is not None:
            maps = F.adaptive_avg_pool2d(maps, self.resized)
        out = self._normalized(self.conv(maps))
        out = F.relu(out) if self.relu else out
        return out.flatten(1) if self.vector_output else out

    def like(self, teacher_features: Tensor) -> Tensor:
        """Return the teacher's features in the shape of the adapter's output."""
        return as_maps(teacher_features, (0, 1, 1)).flatten(1) if self.vector_output else teacher_features

    def _normalized(self, maps: Tensor) -> Tensor:
        # A single value per channel has no variance: the running statistics serve a last batch of one vector.
        norm, several = self.norm, maps.numel() > maps.shape[1]
        return F.batch_norm(
            maps,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training=norm.training and several,
            momentum=0.1,
            eps=norm.eps,
        )


def _convolution(student: Shape, teacher: Shape) -> nn.Conv2d | nn.ConvTranspose2d | None:
    """Return the convolution between maps of two shapes, or None if the release defines none."""
    (channels, height, width), (target, target_height, target_width) = student, teacher
    if (height, width) == (2 * target_height, 2 * target_width):
        return nn.Conv2d(channels, target, 3, stride=2, padding=1)
    if (2 * height, 2 * width) == (target_height, target_width):
        return nn.ConvTranspose2d(channels, target, 4, stride=2, padding=1)
    if height >= target_height and width >= target_width:
        return nn.Conv2d(channels, target, (1 + height - target_height, 1 + width - target_width))
    return None
