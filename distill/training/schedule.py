"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.distill.recipe import LearningRateConfig

ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1 / 25e4
"""Fraction of steps in which the rate rises, and its first and last value as fractions of `lr`. Same as
`torch.optim.lr_scheduler.OneCycleLR`, after Smith and Topin, arXiv 1708.07120; momentum is not changed."""


def rate_factor(config: LearningRateConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the factor by which the learning rate is multiplied at a step, counted from 0.

    >>> from coursepack.distill.recipe import LearningRateConfig
    >>> rate_factor(LearningRateConfig(shape="step", milestones=(2,)), 20, 10, 4)
    0.1
    """
    rise = round(config.warmup_epochs * steps_per_epoch)
    if step < rise:
        return (step + 1) / rise
    return _FACTORS[config.shape](
        config, step - rise, max(1, epochs * steps_per_epoch - rise), step // steps_per_epoch
    )


def _half_cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def _one_cycle(_config: LearningRateConfig, step: int, total: int, _epoch: int) -> float:
    top = ONE_CYCLE_RISE * total - 1
    if step <= top:
        return _half_cosine(ONE_CYCLE_START, 1.0, step / top)
    return _half_cosine(1.0, ONE_CYCLE_END, (step - top) / max(1.0, total - 1 - top))


_FACTORS: dict[str, Callable[[LearningRateConfig, int, int, int], float]] = {
    "constant": lambda _config, _step, _total, _epoch: 1.0,
    "step": lambda config, _step, _total, epoch: config.factor ** sum(m <= epoch for m in config.milestones),
    "cosine": lambda config, step, total, _epoch: _half_cosine(1.0, config.end, step / total),
    "one_cycle": _one_cycle,
}
"""Factor by schedule; arguments are the config, step and total steps after the warm-up, and the epoch."""
