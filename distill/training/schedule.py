"""The learning rate as a function of the step alone, so that a resumed run needs no state of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from coursepack.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1 / 25e4
"""Share of the steps in which the rate rises, and its first and last value as shares of `lr`. Those of
`torch.optim.lr_scheduler.OneCycleLR`, after Smith and Topin, arXiv 1708.07120; momentum is left alone."""


class LearningRateConfig(Config):
    """How the learning rate changes over the steps of a run."""

    shape: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    """`step`: times `factor` at every milestone. `cosine`: half a cosine down to `end`. `one_cycle`: up and
    far down again."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """The rate rises in equal steps for so many epochs first."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Of `step`: epochs at whose beginning the rate falls."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of `step`: what the rate is multiplied by."""
    end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of `cosine`: the last rate as a share of `lr`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.shape == "step") != bool(self.milestones):
            raise ValueError(
                f"milestones are {list(self.milestones)}, but shape is {self.shape!r}: milestones are for "
                "shape 'step', which needs at least one. Give --milestones N,N with it, or "
                "--set optimiser.schedule.milestones=[] with another shape"
            )
        if self.shape == "one_cycle" and self.warmup_epochs:
            raise ValueError("warmup_epochs is set, but shape 'one_cycle' has a rise of its own")
        return self


def rate_factor(config: LearningRateConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """What `lr` is multiplied by at step 0, 1, ... of a run.

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
"""By config, step and number of steps after the warm-up, and epoch."""
