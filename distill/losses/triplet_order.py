"""Order of distances between samples: the student keeps the order on which most teachers agree.

For samples i, j and k of a batch, each teacher votes on whether i is farther from j or from k, by distances
between its own features. The student's features are to have the order of the majority, with a margin:

    o_ijk = sign(sum_t sign(d_t(i, j) - d_t(i, k)))
    loss_i = mean_jk max(0, margin - o_ijk (d(i, j) - d(i, k)))

You, Xu, Xu and Tao, KDD 2017 ("Learning from multiple teacher networks"). The paper's text was not at hand:
the vote and the triplet loss are as recalled. Triplets without a majority add nothing. The mean is over all
triplets of the batch instead of a random choice. Only the order of a teacher's distances matters, so its
features may have any shape, and no adapter is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coursepack.distill.losses.base import (
    BuildContext,
    FeaturePair,
    Loss,
    LossInputs,
    Needs,
    PairNeeds,
)
from coursepack.distill.losses.pairs import PairsConfig, teacher_features
from coursepack.distill.schedule import NotNegative

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_BYTES = 32 << 20
"""Memory for one chunk of triplets and its backward pass; a chunk has at least one anchor."""


class TripletOrderConfig(PairsConfig):
    """Config of the loss on the order of distances.

    The teachers that are paired with one student layer vote on its order. Pairs default to the last block of
    each teacher and of the student.
    """

    term: Literal["triplet_order"] = "triplet_order"
    margin: NotNegative = 0.2
    """Margin between the two distances, in units of the student's features."""


class TripletOrder(nn.Module):
    """Loss on the order of distances: the sum over student layers, per anchor."""

    def __init__(self, pairs: Sequence[FeaturePair], *, margin: float) -> None:
        super().__init__()
        self.margin = margin
        self.votes: dict[str, list[FeaturePair]] = {}
        for pair in pairs:
            self.votes.setdefault(pair.layer, []).append(pair)

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)` of each sample as the anchor i, with gradient to the student's features."""
        losses = []
        for layer, pairs in self.votes.items():
            voters = [distances(teacher_features(inputs, pair)) for pair in pairs]
            student = distances(inputs.student.features[layer])
            losses.append(order_loss(student, torch.stack(voters), self.margin))
        return torch.stack(losses).sum(0)


def distances(features: Tensor) -> Tensor:
    """Return Euclidean distances `(N, N)` between flattened features `(N, ...)`, float32 or float64."""
    wide = features if features.dtype == torch.float64 else features.float()
    flat = wide.flatten(1)
    # Differences and not products: a² + b² - 2ab cancels where samples are close.
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")


def order_loss(student: Tensor, teachers: Tensor, margin: float, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Return the loss `(N,)` of each anchor, the mean over ordered pairs of two other samples.

    Args:
        student: distances `(N, N)`, which receive the gradient.
        teachers: distances `(K, N, N)` of the teachers that vote; detached.
        margin: margin between two distances.
        chunk_bytes: memory limit for one chunk of triplets; does not affect results.
    """
    rows = len(student)
    anchors = max(1, chunk_bytes // (4 * student.element_size() * rows**2))
    sums = []
    for start in range(0, rows, anchors):
        chunk = checkpoint(
            _order_sums,
            student,
            teachers.detach(),
            start,
            min(start + anchors, rows),
            margin,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        assert isinstance(chunk, Tensor)
        sums.append(chunk)
    return torch.cat(sums) / max((rows - 1) * (rows - 2), 1)


def _order_sums(student: Tensor, teachers: Tensor, start: int, stop: int, margin: float) -> Tensor:
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)[start:stop]
    difference = _differences(student, start, stop)
    votes = torch.zeros_like(difference)
    for teacher in teachers:
        votes += _differences(teacher, start, stop).sign()
    order = votes.sign().masked_fill(own[:, :, None] | own[:, None, :], 0)
    losses = (margin - order * difference).relu()
    return torch.where(order != 0, losses, 0).sum((1, 2))


def _differences(distances: Tensor, start: int, stop: int) -> Tensor:
    """Return `d(i, j) - d(i, k)`, `(anchors, N, N)`, for a range of anchors i."""
    return distances[start:stop, :, None] - distances[start:stop, None, :]


def _needs(config: TripletOrderConfig) -> Needs:
    return Needs(
        pairs=PairNeeds(config.pairs, config.layers, reductions=("pooled", "map"), choose="last"),
        every_teacher="votes on the order of distances",
        whole_batch=("triplet_order",),
    )


def _build(config: TripletOrderConfig, context: BuildContext) -> TripletOrder:
    return TripletOrder(context.pairs, margin=config.margin)


LOSS = Loss(
    config=TripletOrderConfig,
    formula="mean over triplets of max(0, margin - o_ijk (d(i, j) - d(i, k))), o the majority's order",
    source="You, Xu, Xu and Tao 2017, KDD, as recalled",
    needs=_needs,
    build=_build,
)
