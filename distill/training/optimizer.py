"""Optimizers, and exponential moving averages of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from torch import nn

    from coursepack.distill.recipe import OptimizerConfig
    from coursepack.distill.training.learner import Learner


def make_optimizer(learner: Learner, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return an optimizer over all parameters of a learner."""
    groups = learner.parameter_groups()
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, **common)
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, **common)
    if config.momentum > 0:
        optimizer.register_step_pre_hook(_complete_momentum)
    return optimizer


def _complete_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Give parameters whose first gradient comes later than others' a momentum of zero.

    A fused step accepts momentum for all parameters of a group or for none.
    """
    for group in optimizer.param_groups:
        trained = [value for value in group["params"] if value.grad is not None]
        new = [value for value in trained if "momentum_buffer" not in optimizer.state.get(value, {})]
        for value in new if len(new) < len(trained) else ():
            optimizer.state[value]["momentum_buffer"] = torch.zeros_like(value)


_KEPT = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
"""Keys of an optimizer's state per parameter, by class."""


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Restore the `state` of another optimizer's `state_dict`; settings of parameter groups are kept.

    Raises:
        ValueError: the state belongs to other parameters or to another kind of optimizer.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, kept in state.items():
        if kept.keys() != _KEPT[type(optimizer)]:
            raise ValueError(f"the optimizer's state of a parameter has {', '.join(map(str, kept))}")
        for name, value in kept.items():
            expected = () if name == "step" else tuple(parameters[index].shape)
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else value
            if found != expected:
                raise ValueError(f"the optimizer's {name} has shape {found!r:.80}, not {expected}")
    if state and isinstance(optimizer, torch.optim.SGD):
        # One that is missing among others would end the first step; one of zeros is as good.
        for index, parameter in enumerate(parameters):
            state.setdefault(index, {"momentum_buffer": torch.zeros_like(parameter)})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a module's parameters and buffers."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch has no types for it
    return AveragedModel(module, multi_avg_fn=average, use_buffers=True)


def update_average(average: AveragedModel, module: nn.Module) -> None:
    """Update a moving average, as `AveragedModel.update_parameters` does, without waiting for the device.

    That method copies its counter to the device at every step. The counter stays on the CPU here.
    """
    kept, given = (
        [value.detach() for value in (*each.parameters(), *each.buffers())]
        for each in (average.module, module)
    )
    assert average.multi_avg_fn is not None
    if int(average.n_averaged) == 0:
        torch._foreach_copy_(kept, given)
    else:
        for is_float in (True, False):
            chosen = [index for index, value in enumerate(kept) if value.is_floating_point() == is_float]
            if chosen:
                average.multi_avg_fn(
                    [kept[i] for i in chosen], [given[i] for i in chosen], average.n_averaged
                )
    average.n_averaged += 1
