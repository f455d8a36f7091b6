"""Exchange of weights: every student follows copies of the others that are refreshed from time to time.

Codistillation: Anil, Pereyra, Passos, Ormandi, Dahl and Hinton 2018, arXiv 1804.03235. In one process, the
copies are part of the exchange's state; replicas in processes of their own exchange files, see `replicas`.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from coursepack.distill.exchange.base import ExchangeConfig, Exchanged, ExchangeInputs

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from coursepack.models import Network


class StaleConfig(ExchangeConfig):
    """Config of the exchange of weights."""

    name: Literal["stale"] = "stale"
    every: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between two exchanges of weights."""
    burn_in: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps before the first exchange, in which students learn without each other."""
    rows: Literal["disjoint", "shared"] = "disjoint"
    """Samples of each student. `disjoint`: a share of its own. `shared`: all of them, in the same batches as
    the others. `batch_size` counts the rows of each student."""

    @property
    def splits_rows(self) -> bool:
        """True if every student reads rows of its own, a share of the samples."""
        return self.rows == "disjoint"

    def is_due(self, steps: int) -> bool:
        """Return true if weights are exchanged after a number of steps."""
        return steps >= self.burn_in and (steps - self.burn_in) % self.every == 0


@dataclass
class Record:
    """Counts of what was exchanged during an epoch."""

    steps: int = 0
    """Number of steps."""
    alone: int = 0
    """Number of steps without any other student's predictions."""
    followed: int = 0
    """Number of students that were followed, summed over steps."""
    staleness: int = 0
    """Age in steps of their weights, summed over steps and students."""
    moved: int = 0
    """Bytes of weights that were written, read or copied."""
    missed: int = 0
    """Number of exchanges that failed, or were left out as the one before had not ended."""

    def add(self, staleness: list[int]) -> None:
        """Count a step with the age of every followed student's weights, for one student."""
        self.steps += 1
        self.alone += not staleness
        self.followed += len(staleness)
        self.staleness += sum(staleness)

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of the epoch."""
        return {
            "peers": self.followed / max(1, self.steps),
            "staleness": self.staleness / self.followed if self.followed else None,
            "steps_alone": self.alone,
            "bytes": self.moved,
            "missed": self.missed,
        }


class Recorded(nn.Module):
    """Base class of exchanges that record what they exchange; the record is saved with their state."""

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()

    def epoch_metrics(self) -> dict[str, Any]:
        """Return the metrics of the epoch, and start the next."""
        metrics, self.record = self.record.metrics(), Record()
        return metrics

    def get_extra_state(self) -> dict[str, int]:
        """Return the record for a checkpoint."""
        return asdict(self.record)

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the record of a checkpoint."""
        self.record = Record(**{name: int(value) for name, value in state.items()})


class Stale(Recorded):
    """Copies of all students, whose logits the others follow.

    The copies run in eval mode on the follower's rows, without gradient.
    """

    def __init__(self, config: StaleConfig, networks: tuple[Network, ...]) -> None:
        super().__init__()
        self.config = config
        self._networks = networks  # in a tuple, so that they are not part of this module
        self.copies = nn.ModuleList(frozen_copy(network).module for network in networks)
        self._follows = False

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the copies stay in eval mode."""
        super().train(mode)
        self.copies.eval()
        return self

    def begin_step(self, steps: int) -> None:
        """Refresh the copies if it is due after a number of steps."""
        if self.config.is_due(steps):
            for network, held in zip(self._networks, self.copies, strict=True):
                self.record.moved += copy_weights(network.module.state_dict(), held)
        self._follows = steps >= self.config.burn_in
        age = (steps - self.config.burn_in) % self.config.every
        self.record.add([age] * (len(self._networks) - 1) if self._follows else [])

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the logits of the others' copies for each student."""
        count = len(self._networks)
        if not self._follows:
            return Exchanged(((),) * count)
        assert inputs.predict is not None
        pairs = zip(self._networks, self.copies, strict=True)
        held = [replace(network, module=module) for network, module in pairs]
        with torch.no_grad():
            return Exchanged(
                tuple(
                    tuple(inputs.predict(held[other], own).float() for other in range(count) if other != own)
                    for own in range(count)
                )
            )


def frozen_copy(network: Network) -> Network:
    """Return a copy of a network in eval mode whose weights are not trained."""
    return replace(network, module=copy.deepcopy(network.module).requires_grad_(False).eval())


@torch.no_grad()
def copy_weights(weights: dict[str, Tensor], module: nn.Module) -> int:
    """Copy weights and buffers of the same names into a module, and return their number of bytes."""
    moved = 0
    for name, value in module.state_dict().items():
        value.copy_(weights[name])
        moved += value.numel() * value.element_size()
    return moved
