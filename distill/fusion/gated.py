"""Gated fusion: the adaptive weights of AMTML-KD, trained by the labels instead of the divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from coursepack.distill.fusion.adaptive import Adaptive
from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.distill.losses.base import Needs
from coursepack.distill.schedule import NotNegative

if TYPE_CHECKING:
    from torch import Tensor

    from coursepack.distill.losses.base import BuildContext, LossInputs


class GatedConfig(FusionConfig):
    """Config of the gated fusion."""

    name: Literal["gated"] = "gated"
    layer: str | None = None
    """Student layer whose maximum over positions is a sample's embedding; defaults to the input of the
    student's head."""
    init: NotNegative = 0.1
    """Standard deviation of the initial latents; with 0.1 the initial weights are nearly equal."""
    student_gradient: bool = False
    """Pass the gradient of the weights on to the student's embedding."""
    divergence_gradient: bool = False
    """Train the weights by the divergence too, as `adaptive` does. It prefers the teacher that is easiest to
    imitate."""


class Gated(Adaptive):
    """Weights as in `Adaptive`, trained by the term `gate`: the cross-entropy of the weighted mixture."""

    def __init__(
        self,
        teachers: int,
        width: int,
        *,
        init: float = 0.1,
        seed: int = 0,
        student_gradient: bool = False,
        divergence_gradient: bool = False,
    ) -> None:
        super().__init__(teachers, width, init=init, seed=seed)
        self.student_gradient = student_gradient
        self.divergence_gradient = divergence_gradient

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return weights `(N, K)`, without gradient unless `divergence_gradient` is set."""
        weights = self.scores(inputs).softmax(1)
        return weights if self.divergence_gradient else weights.detach()

    def scores(self, inputs: LossInputs) -> Tensor:
        """Return the logarithms `(N, K)` of the weights, up to a constant per sample, with gradient."""
        embedding = inputs.student.embedding
        assert embedding is not None
        return self.scores_of(embedding if self.student_gradient else embedding.detach())


def _needs(config: GatedConfig) -> Needs:
    return Needs(embedding="fusion 'gated'", embedding_layer=config.layer)


def _build(config: GatedConfig, context: BuildContext) -> Gated:
    return Gated(
        context.teachers,
        context.embedding_width,
        init=config.init,
        seed=context.seed,
        student_gradient=config.student_gradient,
        divergence_gradient=config.divergence_gradient,
    )


GATED = Fusion(
    config=GatedConfig,
    formula="w_k = softmax_k(v . (theta_k * beta)), trained by the term gate",
    source="weights of Liu, Zhang and Wang 2020 (AMTML-KD), arXiv 2103.04062, section 3.2; trained by labels "
    "like the gate of a mixture of experts (Jacobs et al. 1991)",
    combine="mixture",
    build=_build,
    needs=_needs,
    trained_by="gate",
)
