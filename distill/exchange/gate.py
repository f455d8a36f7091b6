"""Gate: all students follow an ensemble of them, whose weights a small network gives for each sample.

ONE: Lan, Zhu and Gong 2018, NeurIPS, arXiv 1806.04606, equations 4 to 8; details as in its release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from coursepack.distill.exchange.base import Exchange, ExchangeConfig, Exchanged, ExchangeInputs, GroupContext
from coursepack.distill.losses.base import Needs
from coursepack.distill.losses.label import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.losses.base import StudentOutput


class GateConfig(ExchangeConfig):
    """Config of the gate."""

    name: Literal["gate"] = "gate"


class Gate(nn.Module):
    """Gated ensemble, which learns from the labels and is followed by every student."""

    def __init__(self, width: int, students: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, students)
        self.norm = nn.BatchNorm1d(students)

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the ensemble's detached logits for every student, and its cross-entropy to the labels."""
        logits = self.ensembles(inputs.outputs)["gated"]
        losses = {"gated_cross_entropy": cross_entropy(logits, inputs.labels).mean()}
        count = len(inputs.outputs)
        return Exchanged(((logits.detach(),),) * count, (losses, *({} for _ in range(count - 1))))

    def ensembles(self, outputs: Sequence[StudentOutput]) -> dict[str, Tensor]:
        """Return the gated ensemble's logits `(N, C)`."""
        embeddings = [output.embedding for output in outputs if output.embedding is not None]
        weights = self.weights(torch.cat(embeddings, 1))
        logits = torch.stack([output.logits for output in outputs], 1)
        return {"gated": (weights[:, :, None] * logits).sum(1)}

    def weights(self, embeddings: Tensor) -> Tensor:
        """Return the weight of each student `(N, M)`, sum one, from embeddings `(N, D)`."""
        weights: Tensor = self.norm(self.linear(embeddings)).relu().softmax(1)
        return weights


def _needs(_config: GateConfig) -> Needs:
    return Needs(
        embedding="exchange 'gate'", labels=True, whole_batch=("batch normalization of exchange 'gate'",)
    )


def _build(_config: GateConfig, context: GroupContext) -> Gate:
    return Gate(sum(student.embedding_width for student in context.students), len(context.students))


EXCHANGE = Exchange(
    config=GateConfig,
    formula="z_e = sum_i g_i z_i, detached, g = softmax(ReLU(BN(W h))); and CE(z_e, y)",
    source="Lan, Zhu and Gong 2018 (ONE), arXiv 1806.04606, equations 4 to 8",
    needs=_needs,
    build=_build,
    joint="the cross-entropy of the gated ensemble trains all students",
)
