"""Exchange of outputs: every student follows its peers' logits.

Deep mutual learning (DML): Zhang, Xiang, Hospedales and Lu 2018, arXiv 1706.00384, equations 5 to 7 and
algorithm 1. ProKT, also known as LET: Shi, Song, Zhou, Li and Li 2021, arXiv 2107.09305.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from coursepack.distill.exchange.base import Exchange, ExchangeConfig, Exchanged, ExchangeInputs, GroupContext


class OutputsConfig(ExchangeConfig):
    """Config of the exchange of outputs."""

    name: Literal["outputs"] = "outputs"
    order: Literal["simultaneous", "sequential"] = "simultaneous"
    """Order of updates within a step: `simultaneous` updates all students from the same outputs;
    `sequential` updates the peers one after another and then the student, each following the outputs of the
    others at their current weights."""
    mode: Literal["train", "eval"] = "train"
    """Mode in which a student that others follow is run: `eval` computes its targets by a forward pass of
    their own, with the running statistics of batch normalization and without dropout."""
    target: Literal["each", "mean"] = "each"
    """Targets: the logits of `each` peer, over which divergences are averaged, or their `mean`."""

    @property
    def is_sequential(self) -> bool:
        """True if students are updated one after another within a step."""
        return self.order == "sequential"


class Outputs(nn.Module):
    """Detached logits of the peers, or their mean."""

    def __init__(self, config: OutputsConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the logits of the other students for each student, without gradient."""
        logits = [output.logits.detach() for output in inputs.outputs]
        others = [[each for index, each in enumerate(logits) if index != own] for own in range(len(logits))]
        if self.config.target == "mean":
            others = [[torch.stack(each).mean(0)] for each in others]
        return Exchanged(tuple(map(tuple, others)))


def _build(config: OutputsConfig, _context: GroupContext) -> Outputs:
    return Outputs(config)


EXCHANGE = Exchange(
    config=OutputsConfig,
    formula="z_j of every other student j, detached",
    source="Zhang et al. 2018 (DML), arXiv 1706.00384",
    build=_build,
)
