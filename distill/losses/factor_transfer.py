"""Factor transfer (FT): factors of the teacher's features, that a translator makes of the student's too.

Kim, Park and Kwak, NeurIPS 2018, arXiv 1802.04977, in the form of the authors' release. A paraphraser, an
autoencoder of convolutions, learns the factors from the teacher's features without labels. In the paper it is
trained before the student. Here its training is the first phase of the run: for `paraphraser_epochs` epochs
the term is the reconstruction error with weight 1, which trains only the paraphraser while the student learns
from the objective's other terms; then the paraphraser is frozen and the term is the distance of the factors.

RepDistiller compares maps of attention of the factors instead of the factors: `compare: attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.losses.adapters import as_maps, map_shapes
from coursepack.distill.losses.base import (
    BuildContext,
    FeaturePair,
    Loss,
    LossInputs,
    Needs,
    PairNeeds,
)
from coursepack.distill.losses.pairs import PairsConfig, teacher_features
from coursepack.distill.schedule import value_at
from coursepack.models.build import seeded
from coursepack.models.reductions import attention

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOPE = 0.1
"""Slope of the leaky ReLUs for negative values."""


class FTConfig(PairsConfig):
    """Config of factor transfer.

    Pairs default to the last block of each teacher and of the student.
    """

    term: Literal["ft"] = "ft"
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Channels of the factors as a share of the teacher's."""
    paraphraser_epochs: Annotated[int, Field(ge=1)] = 6
    """Number of first epochs, in which the paraphraser is trained and factors are not yet compared."""
    compare: Literal["factors", "attention"] = "factors"
    """`factors` as in the paper, or their maps of `attention` as in RepDistiller."""


class Paraphraser(nn.Module):
    """Autoencoder of a teacher's features: three convolutions to the factors, and three back."""

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encoder = _convolutions(nn.Conv2d, channels, channels, factors, factors)
        self.decoder = _convolutions(nn.ConvTranspose2d, factors, factors, channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Return the reconstructed features `(N, C, H, W)`."""
        reconstructed: Tensor = self.decoder(self.encoder(features))
        return reconstructed


class Translator(nn.Module):
    """Paraphraser of a teacher and three convolutions from the student's features to its factors.

    The student's maps are average-pooled to the teacher's size if they differ.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int], rate: float) -> None:
        super().__init__()
        self.student_shape, self.teacher_shape = map_shapes(student_shape, teacher_shape)
        student, teacher = self.student_shape[0], self.teacher_shape[0]
        factors = max(1, round(teacher * rate))
        self.paraphraser = Paraphraser(teacher, factors)
        self.encoder = _convolutions(nn.Conv2d, student, student, factors, factors)

    def reconstruction_error(self, teacher: Tensor) -> Tensor:
        """Return the mean absolute error of the reconstruction `(N,)`, with gradient to the paraphraser."""
        maps = as_maps(teacher, self.teacher_shape)
        error: Tensor = (self.paraphraser(maps) - maps).abs().flatten(1).mean(1)
        return error

    def factors(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of both, `(N, F, H, W)`; the teacher's are detached."""
        maps = F.adaptive_avg_pool2d(as_maps(student, self.student_shape), self.teacher_shape[1:])
        with torch.no_grad():
            target = self.paraphraser.encoder(as_maps(teacher, self.teacher_shape))
        return self.encoder(maps), target


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean absolute difference of factors scaled to unit length, `(N,)`.

    Args:
        student: factors `(N, ...)`, which receive the gradient.
        teacher: factors `(N, ...)`.
    """
    difference = F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))
    return difference.abs().mean(1)


def _convolutions(
    kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], first: int, second: int, third: int, last: int
) -> nn.Sequential:
    """Return three 3x3 convolutions between the given channels, each with a leaky ReLU."""
    layers: list[nn.Module] = []
    for inside, outside in ((first, second), (second, third), (third, last)):
        layers += [kind(inside, outside, 3, padding=1), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


class FactorTransfer(nn.Module):
    """Reconstruction error, then distance of the factors; summed over pairs, averaged over teachers."""

    def __init__(self, config: FTConfig, pairs: Sequence[FeaturePair], *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.pairs = tuple(pairs)
        with seeded(seed):
            self.translators = nn.ModuleList(
                Translator(pair.student_shape, pair.teacher_shape, config.rate) for pair in pairs
            )

    def begin_epoch(self, epoch: int) -> None:
        """Freeze the paraphrasers from epoch `paraphraser_epochs` on."""
        for translator in self.translators:
            assert isinstance(translator, Translator)
            translator.paraphraser.requires_grad_(epoch < self.config.paraphraser_epochs)

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the weighted loss `(N,)`.

        In the first phase, the paraphrasers receive the gradient of the reconstruction error; afterwards, the
        student's features and the translators that of the distance times the term's weight.
        """
        epoch = inputs.step.epoch
        first = epoch < self.config.paraphraser_epochs
        distance = factor_distance if self.config.compare == "factors" else _attention_distance
        losses = []
        for pair, translator in zip(self.pairs, self.translators, strict=True):
            assert isinstance(translator, Translator)
            teacher = teacher_features(inputs, pair)
            if first:
                losses.append(translator.reconstruction_error(teacher))
            else:
                losses.append(distance(*translator.factors(inputs.student.features[pair.layer], teacher)))
        loss = torch.stack(losses).sum(0) / len({pair.teacher for pair in self.pairs})
        return loss if first else value_at(self.config.weight, epoch) * loss


def _attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return factor_distance(attention(student), attention(teacher))


def _needs(config: FTConfig) -> Needs:
    return Needs(
        pairs=PairNeeds(config.pairs, config.layers, choose="last"),
        every_teacher="the pairs of ft",
        first_epochs=("paraphraser_epochs",),
    )


def _build(config: FTConfig, context: BuildContext) -> FactorTransfer:
    return FactorTransfer(config, context.pairs, seed=context.seed)


LOSS = Loss(
    config=FTConfig,
    formula="mean |n(translator(student)) - n(encoder(teacher))|, n to unit length; first phase: "
    "mean |decoder(encoder(teacher)) - teacher|",
    source="Kim, Park and Kwak 2018 (FT), arXiv 1802.04977; release Jangho-Kim/Factor-Transfer-pytorch",
    needs=_needs,
    build=_build,
    applies_weight=True,
)
