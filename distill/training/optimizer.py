"""The optimizer of a learner, and averaged weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from torch import nn

    from coursepack.distill.recipe import OptimizerConfig
    from coursepack.distill.training.learner import Learner


def make_optimizer(learner: Learner, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make an optimizer over everything that the learner trains."""
    groups = learner.parameter_groups()
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, **common)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, **common)


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a module that follows it as an exponential moving average, buffers too."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch has no types for it
    return AveragedModel(module, multi_avg_fn=average, use_buffers=True)
