"""Attention over peers: each peer follows its own mixture of the peers, and the student their mean.

OKDDip: Chen, Mei, Wang, Feng and Chen 2020, AAAI, arXiv 1912.00350, equations 4 to 8; details as in its
release.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.exchange.base import Exchange, ExchangeConfig, Exchanged, ExchangeInputs, GroupContext
from coursepack.distill.losses.base import Needs
from coursepack.errors import RecipeError


class AttentionConfig(ExchangeConfig):
    """Config of the attention over peers."""

    name: Literal["attention"] = "attention"
    width: Annotated[int, Field(ge=1)] = 8
    """Length of queries and keys."""
    gradient: Literal["all", "attention"] = "all"
    """Gradient of the targets. `all`: into the attention and the peers' logits, so that peers also move
    towards the students that follow them. `attention`: into the attention alone; the logits are detached."""


class Attention(nn.Module):
    """Mixtures of the peers' logits by attention between the peers' embeddings."""

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(width, config.width, bias=False)
        self.key = nn.Linear(width, config.width, bias=False)

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the mean of the peers' logits for the student, and for each peer its own mixture of them."""
        peers = inputs.outputs[1:]
        logits = torch.stack([output.logits for output in peers], 1)
        if self.config.gradient == "attention":
            logits = logits.detach()
        embeddings = torch.stack([_embedding(output.embedding) for output in peers], 1)
        mixtures = self.mixtures(embeddings, logits)
        return Exchanged(((logits.mean(1),), *((mixture,) for mixture in mixtures.unbind(1))))

    def mixtures(self, embeddings: Tensor, logits: Tensor) -> Tensor:
        """Return sum_j a_ij z_j `(N, M, C)`, with a_ij = softmax_j(q_i . k_j) over all M peers.

        Args:
            embeddings: `(N, M, D)`.
            logits: `(N, M, C)`.
        """
        weights = (self.query(embeddings) @ self.key(embeddings).transpose(1, 2)).softmax(2)
        mixtures: Tensor = weights @ logits
        return mixtures


def _embedding(embedding: Tensor | None) -> Tensor:
    assert embedding is not None
    return embedding


def _needs(_config: AttentionConfig) -> Needs:
    return Needs(embedding="exchange 'attention'")


def _build(config: AttentionConfig, context: GroupContext) -> Attention:
    widths = [student.embedding_width for student in context.students[1:]]
    if len(set(widths)) > 1:
        raise RecipeError(
            "exchange 'attention' compares the embeddings of the peers, which have "
            f"{', '.join(map(str, widths))} values: choose peers of one network"
        )
    return Attention(config, widths[0])


EXCHANGE = Exchange(
    config=AttentionConfig,
    formula="peer i: sum_j a_ij z_j over the peers, a_ij = softmax_j(q(h_i) . k(h_j)); student: their mean",
    source="Chen et al. 2020 (OKDDip), arXiv 1912.00350, equations 4 to 8",
    needs=_needs,
    build=_build,
    students=(3, None),
    joint="the targets of exchange 'attention' are not detached",
)
