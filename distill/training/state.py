"""Training state of a student: its learner, optimizer, averaged weights and gradient scaler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.randomness import Purpose, random_words
from coursepack.distill.recipe import OptimizerConfig
from coursepack.distill.training.learner import Learner
from coursepack.distill.training.optimizer import (
    averaged,
    make_optimizer,
    restore_optimizer,
    update_average,
)
from coursepack.distill.training.schedule import rate_factor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.swa_utils import AveragedModel

    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.setup.prepare import Setup
    from coursepack.models import Network

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Autocast dtype by name; None means no autocast."""


@dataclass
class TrainState:
    """Training state of a student; `make_state` creates it from a recipe."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps_per_epoch: int = 1
    epochs: int = 1
    seed: int = 0
    average: AveragedModel | None = None
    scaler: torch.amp.GradScaler | None = None
    steps: int = 0
    """Number of completed optimizer steps."""
    second: torch.optim.Optimizer | None = None
    """Optimizer of an exchange's second step; None if it has none."""
    is_frozen: bool = False
    """True for a peer that keeps its weights."""

    @property
    def network(self) -> Network:
        """Network that is evaluated and saved: the student, or the moving average of its weights."""
        network = self.learner.network
        return network if self.average is None else replace(network, module=self.average.module)

    def begin_step(self) -> None:
        """Set the learning rate and clear the gradients."""
        rate = self.config.lr * rate_factor(
            self.config.schedule, self.steps, self.steps_per_epoch, self.epochs
        )
        for optimizer in filter(None, (self.optimizer, self.second)):
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)

    def scaled(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """Return the value whose gradient is accumulated: a loss times `share` and the gradient scale."""
        loss = loss if share == 1.0 else loss * share
        return loss if self.scaler is None else self.scaler.scale(loss)

    def end_step(self) -> None:
        """Average gradients over ranks, and update the parameters and their moving average.

        Buffers, such as running statistics of batch normalization, are copied from the first rank as in
        DistributedDataParallel.
        """
        self.steps += 1
        if self.is_frozen:
            return
        ranks = self.learner.ranks
        ranks.average_gradients(self.learner.parameters())
        ranks.broadcast_tensors(self.learner.buffers())
        if self.scaler is not None and self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.clip)
        is_skipped = False
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            is_skipped = self._update_scale()
        if self.average is not None and not is_skipped:
            update_average(self.average, self.learner.network.module)

    def end_second_step(self) -> None:
        """Update the parameters by the gradients of the exchange's second losses."""
        assert self.second is not None
        self.learner.ranks.average_gradients(self.learner.parameters())
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.clip)
        self.second.step()

    def _update_scale(self) -> bool:
        """Update the gradient scale; return true if the step was skipped because gradients overflowed."""
        assert self.scaler is not None
        if self.average is None:  # reading the scale waits for the device
            self.scaler.update()
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        return self.scaler.get_scale() < before  # it falls after an overflow, and only then

    def seed_step(self, device: torch.device, micro_batch: int) -> None:
        """Seed torch's generators, as used by dropout, from the seed, step, micro-batch and rank."""
        ranks = self.learner.ranks
        index = micro_batch * ranks.count + ranks.index
        words = random_words(self.seed, np.array([self.steps]), index, Purpose.STEP)[0]
        seed = int(words[:2].view(np.int64)[0])
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def broadcast_weights(self) -> None:
        """Copy the first rank's weights and buffers to all ranks."""
        modules = [self.learner, *([] if self.average is None else [self.average])]
        self.learner.ranks.broadcast_tensors(
            value for module in modules for value in (*module.parameters(), *module.buffers())
        )

    def state(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""
        parts: dict[str, Any] = {
            "learner": self.learner,
            "optimizer": self.optimizer,
            "average": self.average,
            "scaler": self.scaler,
            "second": self.second,
        }
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {**states, "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a result of `state`."""
        self.learner.load_state_dict(state["learner"])
        restore_optimizer(self.optimizer, state["optimizer"]["state"])
        if self.second is not None:
            restore_optimizer(self.second, state["second"]["state"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.steps = int(state["steps"])


def make_state(setup: Setup, recipe: TrainRecipe | None = None) -> TrainState:
    """Return the state of a freshly initialized student that trains alone.

    Args:
        setup: the setup that it trains in.
        recipe: recipe of the student; defaults to the setup's.
    """
    recipe = recipe or setup.recipe
    return state_of(make_learner(setup, recipe), recipe, setup.steps_per_epoch)


def make_learner(setup: Setup, recipe: TrainRecipe) -> Learner:
    """Return a freshly initialized student with its objective, on the setup's device."""
    student = setup.student(recipe)
    return Learner(
        student,
        setup.objective(recipe, student),
        precision=PRECISIONS[recipe.precision],
        compiled=recipe.compile,
        ranks=setup.ranks,
    ).to(setup.device)


def state_of(learner: Learner, recipe: TrainRecipe, steps_per_epoch: int) -> TrainState:
    """Return the initial state of a learner that is already on its device."""
    config = recipe.optimizer
    device = next(learner.parameters()).device
    return TrainState(
        learner,
        make_optimizer(learner, config),
        config,
        steps_per_epoch,
        recipe.epochs,
        recipe.own_seed,
        None if config.ema is None else averaged(learner.network.module, config.ema),
        torch.amp.GradScaler(device.type) if recipe.precision == "float16" else None,
    )
