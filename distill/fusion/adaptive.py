"""The adaptive fusion of AMTML-KD: weights per sample from latent vectors trained with the student."""

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
    """Numbers of the adaptive fusion."""

    name: Literal["adaptive"] = "adaptive"
    layer: str | None = None
    """The student's layer whose maximum over positions is a sample's embedding; None means the input of the
    student's head."""
    init: NotNegative = 1.0
    """Standard deviation of the initial latents. At 1, the release's, wide students begin with nearly all
    weight on one teacher; with 0.1 they begin close to equal."""
    joint_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs in which the latents are trained before they are frozen; None means all."""


class Adaptive(nn.Module):
    """A latent vector per teacher, compared with the student's embedding of each sample.

        a_ki = v . (theta_k * beta_i),   w_i = softmax_k(a_i)

    Liu, Zhang and Wang 2020, arXiv 2103.04062, section 3.2. The embedding beta_i gets a gradient, by
    construction; so do theta and v. With one teacher the weight is exactly one.
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
        return ((embedding.float() * self.shared) @ self.latents.T).softmax(1)

    def begin_epoch(self, epoch: int) -> None:
        """Freeze the latents once their epochs are over."""
        self.requires_grad_(self.joint_epochs is None or epoch < self.joint_epochs)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the latents without weight decay: their penalty is a term of the objective."""
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
