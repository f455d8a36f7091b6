"""L2 penalty on the latent vectors of the fusions `adaptive` and `gated` while they are trained.

Liu, Zhang and Wang 2020 (AMTML-KD), arXiv 2103.04062; the penalty is in its release.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.distill.schedule import Weight
from coursepack.errors import RecipeError


class LatentsConfig(TermConfig):
    """Config of the L2 penalty on latent vectors."""

    term: Literal["latents"] = "latents"
    weight: Weight = 0.1


class Latents(nn.Module):
    """Sum of the squared norms of the fusion's latent vectors."""

    def forward(self, inputs: LossInputs) -> Tensor | None:
        """Return `||v||² + sum_k ||theta_k||²`, a scalar, or None if the latents are frozen.

        Raises:
            RecipeError: the objective's fusion has no latents.
        """
        latents = None if inputs.fusion is None else dict(inputs.fusion.named_parameters())
        if not latents:
            raise RecipeError(
                "the term 'latents' needs fusion 'adaptive' or 'gated', but this objective's fusion has no "
                "latents: set fusion.name=adaptive, or leave the term out"
            )
        trained = [value for value in latents.values() if value.requires_grad]
        return (
            sum((value.square().sum() for value in trained[1:]), trained[0].square().sum())
            if trained
            else None
        )


def _needs(_config: LatentsConfig) -> Needs:
    return Needs(fused=True)


def _build(_config: LatentsConfig, _context: BuildContext) -> Latents:
    return Latents()


LOSS = Loss(
    config=LatentsConfig,
    formula="||v||² + sum_k ||theta_k||²",
    source="Liu, Zhang and Wang 2020 (AMTML-KD), arXiv 2103.04062, and its release",
    needs=_needs,
    build=_build,
)
