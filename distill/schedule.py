"""Schedules of loss weights and temperatures over epochs: warm-up, ramp, cosine or step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from coursepack.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

NotNegative = Annotated[float, Field(ge=0)]


class Schedule(Config):
    """Schedule of a number that goes from `start` to `end` in `epochs` epochs and then stays at `end`."""

    shape: Literal["warmup", "ramp", "cosine", "step"]
    """Curve from start to end: `warmup` is linear, `ramp` is exp(-5 (1 - t)²), which rises slowly at first,
    `cosine` is half a cosine, and `step` stays at the start."""
    start: NotNegative = 0.0
    """Value in epoch 0; `ramp` starts 0.7 % closer to `end`."""
    end: NotNegative = 1.0
    """Value from epoch `epochs` on."""
    epochs: Annotated[int, Field(ge=1)]
    """Number of epochs from start to end."""

    def at(self, epoch: int) -> float:
        """Return the value in an epoch, counted from 0.

        >>> Schedule(shape="warmup", end=2.0, epochs=4).at(1)
        0.5
        """
        if epoch >= self.epochs:
            return self.end
        t = epoch / self.epochs
        return self.start + (self.end - self.start) * SHAPES[self.shape](t)


Weight = NotNegative | Schedule
"""Nonnegative factor, or its schedule over epochs."""


Temperature = Annotated[float, Field(gt=0, le=100)]
"""Temperature T, by which logits are divided."""


class TemperatureSchedule(Schedule):
    """Schedule of a temperature, which usually falls: `{shape: warmup, start: 4, end: 1, epochs: 30}`."""

    start: Temperature
    """Temperature in epoch 0."""
    end: Temperature = 1.0
    """Temperature from epoch `epochs` on."""


def value_at(value: float | Schedule, epoch: int) -> float:
    """Return the value of a weight or a temperature in an epoch."""
    return value.at(epoch) if isinstance(value, Schedule) else value


def range_of(value: float | Schedule) -> tuple[float, float]:
    """Return the smallest and the largest value over all epochs."""
    ends = (value.start, value.end) if isinstance(value, Schedule) else (value, value)
    return min(ends), max(ends)


def is_used(weight: float | Schedule) -> bool:
    """Return true if a weight is above zero in any epoch."""
    return max(weight.start, weight.end) > 0 if isinstance(weight, Schedule) else weight > 0


SHAPES: dict[str, Callable[[float], float]] = {
    "warmup": lambda t: t,
    "ramp": lambda t: math.exp(-5 * (1 - t) ** 2),
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "step": lambda _: 0.0,
}
"""Interpolation factor from start to end, as a function of the fraction t of the epochs, by curve name."""
