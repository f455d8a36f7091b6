"""Squared error to the teachers' logits, which grow from nearly zero to full size over the first phase.

Jafari et al. 2021 (Annealing-KD), arXiv 2104.07163: in phase 1 the student regresses Phi(T) z_t, with
Phi(T) = 1 - (T - 1) / T_max and T falling from T_max to 1 in blocks of epochs. Phase 2, on labels alone, is a
matter of the weights of this term and of the cross-entropy.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig

Count = Annotated[int, Field(ge=1)]


class AnnealedLogitsConfig(TermConfig):
    """Config of the squared error to annealed logits."""

    term: Literal["annealed_logits"] = "annealed_logits"
    highest: Count = 10
    """Highest temperature T_max, and the number of blocks of epochs."""
    epochs: Count = 30
    """Epochs until the logits have full size: T falls from T_max to 1 in blocks of epochs / T_max."""

    def scale_at(self, epoch: int) -> float:
        """Return the factor Phi of the teachers' logits in an epoch.

        >>> [AnnealedLogitsConfig(highest=4, epochs=8).scale_at(epoch) for epoch in (0, 1, 2, 7, 9)]
        [0.25, 0.25, 0.5, 1.0, 1.0]
        """
        return min(1 + epoch * self.highest // self.epochs, self.highest) / self.highest


class AnnealedLogits(nn.Module):
    """Mean over classes of the squared error to the annealed logits, per sample."""

    def __init__(self, config: AnnealedLogitsConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, with gradient to the student's logits, which are not softened.

        Several teachers are compared as the weighted mean of their logits.
        """
        soft = inputs.soft
        student = soft.comparable(inputs.student.logits).float()
        scale = self.config.scale_at(inputs.step.epoch)
        return (student - scale * soft.mean_logits.float()).square().mean(1)


def _needs(_config: AnnealedLogitsConfig) -> Needs:
    return Needs(fused=True, dense_logits="annealed logits")


def _build(config: AnnealedLogitsConfig, _context: BuildContext) -> AnnealedLogits:
    return AnnealedLogits(config)


LOSS = Loss(
    config=AnnealedLogitsConfig,
    formula="mean_c (z - Phi sum_k w_k z_k)², Phi = 1 - (T - 1) / T_max, T from T_max down to 1",
    source="Jafari et al. 2021 (Annealing-KD), arXiv 2104.07163",
    needs=_needs,
    build=_build,
)
