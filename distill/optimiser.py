"""How parameters are updated: the optimiser, its learning rate, gradient clipping, averaged weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from coursepack.config import Config
from coursepack.distill.learning_rate import LearningRateConfig

if TYPE_CHECKING:
    from torch import nn

    from coursepack.distill.learner import Learner

BelowOne = Annotated[float, Field(ge=0, lt=1)]


class OptimiserConfig(Config):
    """How a learner's parameters are updated."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent, or AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
    lr: Annotated[float, Field(gt=0)] = 0.05
    """Learning rate, which the schedule multiplies."""
    schedule: LearningRateConfig = LearningRateConfig()
    """How the learning rate changes."""
    momentum: BelowOne = 0.9
    """Of `sgd`."""
    nesterov: bool = True
    """Of `sgd`: Nesterov's momentum, where momentum is not zero."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Of `adamw`."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 penalty of `sgd`, decoupled decay of `adamw`."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of all gradients together; none means no limit."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of the student's averaged weights, which are then what is evaluated and kept; none
    means no average."""


def make_optimiser(learner: Learner, config: OptimiserConfig) -> torch.optim.Optimizer:
    """An optimiser over all that the learner trains; the fusion's latents have an L2 penalty of their own."""
    groups = learner.parameter_groups()
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, **common)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, **common)


_KEPT = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
"""What optimisers keep of a parameter."""


def restore_optimiser(optimiser: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Continue from the `state` of another optimiser's `state_dict`; what groups are told stays as it is.

    Raises:
        ValueError: it was the state of other parameters, or of another kind of optimiser.
    """
    groups = optimiser.state_dict()["param_groups"]
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for index, kept in state.items():
        if kept.keys() != _KEPT[type(optimiser)]:
            raise ValueError(f"the optimiser keeps {', '.join(map(str, kept))} of a parameter")
        for name, value in kept.items():
            expected = () if name == "step" else tuple(parameters[index].shape)
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else value
            if found != expected:
                raise ValueError(f"the optimiser's {name} has shape {found!r:.80}, not {expected}")
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of a module that follows it as an exponential moving average, buffers too."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch has no types for it
    return AveragedModel(module, multi_avg_fn=average, use_buffers=True)
