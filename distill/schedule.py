"""Numbers that change over epochs: constant, warm-up, ramp or cosine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from coursepack.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

NotNegative = Annotated[float, Field(ge=0)]


class Schedule(Config):
    """A number per epoch, from `start` to `end` within `epochs` epochs, and `end` from then on."""

    shape: Literal["warmup", "ramp", "cosine"]
    """`warmup`: in equal steps. `ramp`: times exp(-5 (1 - t)²), slow at first. `cosine`: half a cosine."""
    start: NotNegative = 0.0
    """Value in epoch 0; `ramp` begins a little nearer to `end`."""
    end: NotNegative = 1.0
    """Value from epoch `epochs` on."""
    epochs: Annotated[int, Field(ge=1)]
    """Epochs from start to end."""

    def at(self, epoch: int) -> float:
        """Value in epoch 0, 1, ...

        >>> Schedule(shape="warmup", end=2.0, epochs=4).at(1)
        0.5
        """
        if epoch >= self.epochs:
            return self.end
        t = epoch / self.epochs
        return self.start + (self.end - self.start) * SHAPES[self.shape](t)


Weight = NotNegative | Schedule
"""A factor that is not negative, or its schedule over epochs."""


def value_at(weight: float | Schedule, epoch: int) -> float:
    """The number that a weight is in an epoch."""
    return weight.at(epoch) if isinstance(weight, Schedule) else weight


def is_used(weight: float | Schedule) -> bool:
    """Whether a weight is ever above zero."""
    return max(weight.start, weight.end) > 0 if isinstance(weight, Schedule) else weight > 0


SHAPES: dict[str, Callable[[float], float]] = {
    "warmup": lambda t: t,
    "ramp": lambda t: math.exp(-5 * (1 - t) ** 2),
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}
"""Share of the way that is done after a share t of the epochs; `ramp` begins at exp(-5) = 0.007."""
