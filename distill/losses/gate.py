"""Cross-entropy of the teachers' weighted mixture to the labels, which trains the weights of a gate.

The likelihood of a mixture of experts (Jacobs et al. 1991) with the teachers as fixed experts. The student's
logits get no gradient.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.distill.losses.label import IGNORED
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels, teacher_stats


class GateConfig(TermConfig):
    """Config of the cross-entropy of the mixture."""

    term: Literal["gate"] = "gate"


class Gate(nn.Module):
    """Cross-entropy of `sum_k w_k P_k`, at T = 1 and without adjustments, to hard or mixed labels."""

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)` in nats, with gradient to the fusion's parameters.

        Raises:
            RecipeError: the objective's fusion is not `gated`.
        """
        fusion: Any = inputs.fusion
        labels = inputs.labels
        if not hasattr(fusion, "scores"):
            raise RecipeError(
                "the term 'gate' trains fusion 'gated', but this objective has another fusion: set "
                "fusion.name=gated, or leave the term out"
            )
        log_weights: Tensor = fusion.scores(inputs).log_softmax(1)

        def mixture_cross_entropy(ids: Tensor) -> Tensor:
            cross_entropy = teacher_stats(inputs.teachers.logits, ids).cross_entropy
            assert cross_entropy is not None
            return -(log_weights - cross_entropy.T).logsumexp(1).masked_fill(ids == IGNORED, 0)

        if not isinstance(labels, MixedLabels):
            return mixture_cross_entropy(labels)
        first, second = mixture_cross_entropy(labels.first), mixture_cross_entropy(labels.second)
        return labels.lam * first + (1 - labels.lam) * second


def _needs(_config: GateConfig) -> Needs:
    return Needs(fused=True, labels=True)


def _build(_config: GateConfig, _context: BuildContext) -> Gate:
    return Gate()


LOSS = Loss(
    config=GateConfig,
    formula="-log sum_k w_k P_k(y), P_k at T = 1",
    source="likelihood of a mixture of experts, Jacobs, Jordan, Nowlan and Hinton 1991",
    needs=_needs,
    build=_build,
)
