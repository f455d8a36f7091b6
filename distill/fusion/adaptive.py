"""Adaptive fusion of AMTML-KD: weights per sample, computed from latent vectors trained with the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.distill.losses.base import Needs
from coursepack.distill.schedule import NotNegative

if TYPE_CHECKING:
    from coursepack.distill.losses.base import BuildContext, LossInputs


class AdaptiveConfig(FusionConfig):
    """Config of the adaptive fusion."""

    name: Literal["adaptive"] = "adaptive"
    layer: str | None = None
    """Student layer whose maximum over positions is a sample's embedding; defaults to the input of the
    student's head."""
    init: NotNegative = 1.0
    """Standard deviation of the initial latents. With 1, the value of the release, wide students start with
    nearly all weight on one teacher; with 0.1 the initial weights are nearly equal."""
    joint_epochs: Annotated[int, Field(ge=1)] | None = None
    """Number of epochs after which the latents are frozen; defaults to never."""


class Adaptive(nn.Module):
    """Weights from a latent vector per teacher and the student's embedding of each sample.

        a_ki = v . (theta_k * beta_i),   w_i = softmax_k(a_i)

    Liu, Zhang and Wang 2020, arXiv 2103.04062, section 3.2. The embedding beta_i, theta and v
    receive gradients. With one teacher the weight is exactly one.
    """

    def __init__(
        self, teachers: int, width: int, *, init: float = 1.0, seed: int = 0, joint_epochs: int | None = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.latents = nn.Parameter(init * torch.randn(teachers, width, generator=generator))
        self.shared = nn.Parameter(init * torch.randn(width, generator=generator))
        self.joint_epochs = joint_epochs

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return weights `(N, K)`."""
        embedding = inputs.student.embedding
        assert embedding is not None
        return self.scores_of(embedding).softmax(1)

    def scores_of(self, embedding: Tensor) -> Tensor:
        """Return the scores `a` `(N, K)`, whose softmax is the weights, for an embedding `(N, D)`."""
        return (embedding.float() * self.shared) @ self.latents.T

    def begin_epoch(self, epoch: int) -> None:
        """Freeze the latents from epoch `joint_epochs` on."""
        self.requires_grad_(self.joint_epochs is None or epoch < self.joint_epochs)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the latents as a group without weight decay; the term `latents` penalizes them instead."""
        return [{"params": list(self.parameters()), "weight_decay": 0.0}]


def _needs(config: AdaptiveConfig) -> Needs:
    return Needs(embedding="fusion 'adaptive'", embedding_layer=config.layer)


def _build(config: AdaptiveConfig, context: BuildContext) -> Adaptive:
    width = context.embedding_width
    return Adaptive(
        context.teachers, width, init=config.init, seed=context.seed, joint_epochs=config.joint_epochs
    )


ADAPTIVE = Fusion(
    config=AdaptiveConfig,
    formula="w_k = softmax_k(v . (theta_k * beta)), beta the student's embedding",
    source="Liu, Zhang and Wang 2020 (AMTML-KD), arXiv 2103.04062, section 3.2",
    combine="mixture",
    build=_build,
    needs=_needs,
)
