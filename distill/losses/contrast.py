"""Contrastive representation distillation (CRD) with a memory bank of all samples.

Tian, Krishnan and Isola, ICLR 2020, arXiv 1910.10699, in the form of the authors' release. Student and
teacher are embedded by one linear layer each, both trained, and scaled to unit length. A sample's embedding
by one network should resemble the memory of the other network's embedding of the same sample, and not that of
samples of other classes. Memories follow the embeddings after each optimizer step. They are state of the run:
buffers in `state_dict`, one row of `dim` numbers per sample and network.

Negatives are drawn with replacement from the training samples of other classes, by (seed, sample, epoch); the
release draws without replacement where there are enough samples.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coursepack.data.randomness import Purpose, below, random_words
from coursepack.device import to_device
from coursepack.distill.losses.adapters import as_maps
from coursepack.distill.losses.base import (
    BuildContext,
    FeaturePair,
    Loss,
    LossInputs,
    Needs,
    PairNeeds,
)
from coursepack.distill.losses.pairs import PairsConfig, teacher_features
from coursepack.errors import RecipeError
from coursepack.models.build import seeded

if TYPE_CHECKING:
    from coursepack.data.randomness import Samples


class CRDConfig(PairsConfig):
    """Config of contrastive representation distillation.

    Features are averaged over positions. Pairs default to the last block of each teacher and of the student.
    """

    term: Literal["crd"] = "crd"
    dim: Annotated[int, Field(ge=1)] = 128
    """Width of the embeddings."""
    negatives: Annotated[int, Field(ge=1, le=1 << 17)] = 16384
    """Number of negatives per sample."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Divisor of the cosines."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a memory's row that is kept when it is updated."""


class Negatives:
    """Draws samples of other classes as rows of the memory."""

    def __init__(self, samples: Samples, labels: Samples, count: int, seed: int) -> None:
        """Sort the training samples by class.

        Args:
            samples: indices of the training samples, ascending, which are the rows of the memory in order.
            labels: their classes.
            count: number of negatives per sample.
            seed: seed of the draws.

        Raises:
            RecipeError: all samples have the same class.
        """
        self.samples, self.labels, self.count, self.seed = samples, labels, count, seed
        classes, self.sizes = np.unique(labels, return_counts=True)
        if len(classes) < 2:
            raise RecipeError(
                f"term 'crd' draws negatives of other classes, but all {len(labels)} training samples have "
                "the same class: give a larger limit"
            )
        self.by_class = np.argsort(labels, kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.class_index = np.searchsorted(classes, labels)

    def rows_of(self, samples: Samples) -> Samples:
        """Return the memory's row of each sample, `(N,)`."""
        rows: Samples = np.searchsorted(self.samples, samples)
        return rows

    def draw(self, samples: Samples, epoch: int) -> Samples:
        """Return rows of negatives for each sample, `(N, count)`."""
        streams = -(-self.count // 4)
        words = random_words(self.seed, samples, epoch, Purpose.NEGATIVES, streams)[:, : self.count]
        own = self.class_index[self.rows_of(samples)]
        start, size = self.starts[own][:, None], self.sizes[own][:, None]
        index = below(words, len(self.labels) - size)
        rows: Samples = self.by_class[np.where(index < start, index, index + size)]
        return rows


class Contrast(nn.Module):
    """Embeddings of a student and a teacher, and the memories of both."""

    def __init__(self, student_width: int, teacher_width: int, samples: int, config: CRDConfig) -> None:
        super().__init__()
        self.temperature, self.momentum = config.temperature, config.momentum
        self.student = nn.Linear(student_width, config.dim)
        self.teacher = nn.Linear(teacher_width, config.dim)
        self.student_memory: Tensor
        self.teacher_memory: Tensor
        self.log_normalizers: Tensor
        bound = 1 / math.sqrt(config.dim / 3)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(samples, config.dim).uniform_(-bound, bound))
        self.register_buffer("log_normalizers", torch.full((2,), -math.inf))

    def embed(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of features `(N, D)` by both networks, `(N, dim)` of unit length."""
        return F.normalize(self.student(student)), F.normalize(self.teacher(teacher))

    def forward(self, student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
        """Return the loss `(N,)` of embeddings, with gradient to both.

        The first call sets the normalizers, as in the release: the mean score of its batch times the number
        of samples.

        Args:
            student: the student's embeddings `(N, dim)`.
            teacher: the teacher's embeddings `(N, dim)`.
            rows: rows of the memory `(N, 1 + negatives)`; the first is the sample's own.
        """
        samples = len(self.student_memory)
        # All scores at once: at most samples / negatives times the products, but no copy of the rows.
        scores = [
            (embedding @ memory.T).gather(1, rows) / self.temperature
            for embedding, memory in ((student, self.teacher_memory), (teacher, self.student_memory))
        ]
        with torch.no_grad():
            found = torch.stack([score.logsumexp((0, 1)) for score in scores])
            found = found - math.log(rows.numel()) + math.log(samples)
            self.log_normalizers.copy_(
                torch.where(self.log_normalizers.isneginf(), found, self.log_normalizers)
            )
        share = math.log((rows.shape[1] - 1) / samples)
        losses = [
            contrastive_loss(score - normalizer, share)
            for score, normalizer in zip(scores, self.log_normalizers.unbind(), strict=True)
        ]
        return losses[0] + losses[1]

    @torch.no_grad()
    def remember(self, student: Tensor, teacher: Tensor, rows: Tensor) -> None:
        """Move rows of the memories `(N,)`, all different, towards embeddings `(N, dim)`."""
        for memory, embedding in ((self.student_memory, student), (self.teacher_memory, teacher)):
            moved = self.momentum * memory[rows] + (1 - self.momentum) * embedding
            memory[rows] = F.normalize(moved)


def contrastive_loss(log_scores: Tensor, log_share: float) -> Tensor:
    """Return `-log(u_0 / (u_0 + c)) - sum_j log(c / (u_j + c))`, `(N,)`.

    Args:
        log_scores: log u `(N, 1 + negatives)`, the positive first.
        log_share: log c, c the number of negatives divided by the number of samples.
    """
    gap = log_scores - log_share
    return -F.logsigmoid(gap[:, 0]) - F.logsigmoid(-gap[:, 1:]).sum(1)


class CRD(nn.Module):
    """Contrastive loss of each pair, summed over a teacher's pairs and averaged over teachers."""

    def __init__(self, config: CRDConfig, context: BuildContext) -> None:
        """Build embeddings and memories.

        Raises:
            RecipeError: the context has no labels, or only one class.
        """
        super().__init__()
        if context.labels is None:
            raise RecipeError(
                "term 'crd' draws negatives of other classes, but the labels of the training split are not "
                "known: build the objective with make_objective(stores, student, method)"
            )
        samples = np.arange(len(context.labels)) if context.samples is None else np.sort(context.samples)
        self.pairs: tuple[FeaturePair, ...] = context.pairs
        self.negatives = Negatives(samples, context.labels[samples], config.negatives, context.seed)
        with seeded(context.seed):
            self.contrasts = nn.ModuleList(
                Contrast(pair.student_shape[0], pair.teacher_shape[0], len(samples), config)
                for pair in self.pairs
            )

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student's features and both embeddings."""
        samples, device = _samples(inputs), inputs.student.logits.device
        own = self.negatives.rows_of(samples)
        rows = np.concatenate([own[:, None], self.negatives.draw(samples, inputs.step.epoch)], 1)
        index = to_device(rows, device)
        losses = []
        for number, (pair, contrast) in enumerate(zip(self.pairs, self.contrasts, strict=True)):
            assert isinstance(contrast, Contrast)
            student, teacher = contrast.embed(
                _vectors(inputs.student.features[pair.layer]), _vectors(teacher_features(inputs, pair))
            )
            inputs.shared[self._key(number, "student")] = student.detach()
            inputs.shared[self._key(number, "teacher")] = teacher.detach()
            losses.append(contrast(student, teacher, index))
        return torch.stack(losses).sum(0) / len({pair.teacher for pair in self.pairs})

    def after_step(self, inputs: LossInputs) -> None:
        """Update the memories with the embeddings of the forward pass.

        If a batch holds several views of a sample, the first is remembered.
        """
        samples, first = np.unique(_samples(inputs), return_index=True)
        device = inputs.student.logits.device
        rows, kept = (to_device(index, device) for index in (self.negatives.rows_of(samples), first))
        for number, contrast in enumerate(self.contrasts):
            assert isinstance(contrast, Contrast)
            student, teacher = (inputs.shared[self._key(number, side)] for side in ("student", "teacher"))
            contrast.remember(student[kept], teacher[kept], rows)

    def _key(self, number: int, side: str) -> str:
        return f"crd {id(self)} {number} {side}"


def _vectors(features: Tensor) -> Tensor:
    return as_maps(features, (0, 1, 1)).flatten(1)


def _samples(inputs: LossInputs) -> Samples:
    if inputs.samples is None:
        raise RecipeError(
            "term 'crd' keeps a memory of the samples, but LossInputs.samples is None: pass the indices of "
            "the batch's samples"
        )
    return inputs.samples


def _needs(config: CRDConfig) -> Needs:
    return Needs(
        pairs=PairNeeds(config.pairs, config.layers, ("pooled", "map"), choose="last"),
        every_teacher="the pairs of crd",
        labels=True,
        one_label="crd draws negatives of other classes",
        whole_batch=("crd",),
        one_process="crd keeps a memory of the samples",
    )


def _build(config: CRDConfig, context: BuildContext) -> CRD:
    return CRD(config, context)


LOSS = Loss(
    config=CRDConfig,
    formula="-log u_i / (u_i + c) - sum_j log c / (u_j + c), u = exp(g . memory / tau) / Z, both ways",
    source="Tian, Krishnan and Isola 2020 (CRD), arXiv 1910.10699; RepDistiller, CRDLoss",
    needs=_needs,
    build=_build,
)
