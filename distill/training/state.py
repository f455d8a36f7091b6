"""The state of a student in training: a learner, its optimizer, and everything else that changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.randomness import Purpose, random_words
from coursepack.distill.recipe import OptimizerConfig
from coursepack.distill.training.learner import Learner
from coursepack.distill.training.optimizer import averaged, make_optimizer, restore_optimizer
from coursepack.distill.training.schedule import rate_factor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.swa_utils import AveragedModel

    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.setup.prepare import Setup
    from coursepack.models import Network

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TrainState:
    """A learner and its optimizer. `make_state` makes a recipe's."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps_per_epoch: int = 1
    epochs: int = 1
    seed: int = 0
    average: AveragedModel | None = None
    scaler: torch.amp.GradScaler | None = None
    steps: int = 0
    """Updates made so far."""

    @property
    def network(self) -> Network:
        """The network that is evaluated and kept: the student, or its average."""
        network = self.learner.network
        return network if self.average is None else replace(network, module=self.average.module)

    def begin_step(self) -> None:
        """Set the learning rate and clear the gradients."""
        rate = self.config.lr * rate_factor(
            self.config.schedule, self.steps, self.steps_per_epoch, self.epochs
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, share: float = 1.0) -> None:
        """Add the gradients of a loss, or of the given share of it."""
        loss = loss if share == 1.0 else loss * share
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def end_step(self) -> None:
        """Update the parameters, and their average, by the mean of all ranks' gradients.

        Buffers (running statistics of batch normalisation) become those of the first rank, as in
        DistributedDataParallel.
        """
        ranks = self.learner.ranks
        ranks.average_gradients(self.learner.parameters())
        ranks.copy_first(self.learner.buffers())
        if self.scaler is not None and self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.clip)
        is_left_out = False
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            is_left_out = self._update_scale()
        if self.average is not None and not is_left_out:
            self.average.update_parameters(self.learner.network.module)
        self.steps += 1

    def _update_scale(self) -> bool:
        """Adjust the scale of float16's gradients; return true if their overflow left the step out."""
        assert self.scaler is not None
        if self.average is None:  # reading the scale waits for the device
            self.scaler.update()
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        return self.scaler.get_scale() < before  # it falls after an overflow, and only then

    def seed_step(self, device: torch.device, micro_batch: int) -> None:
        """Seed what the network draws (dropout) by seed, step, micro-batch and rank alone."""
        ranks = self.learner.ranks
        index = micro_batch * ranks.count + ranks.index
        words = random_words(self.seed, np.array([self.steps]), index, Purpose.STEP)[0]
        seed = int(words[:2].view(np.int64)[0])
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def copy_first_rank(self) -> None:
        """Take over the first rank's weights."""
        modules = [self.learner, *([] if self.average is None else [self.average])]
        self.learner.ranks.copy_first(
            value for module in modules for value in (*module.parameters(), *module.buffers())
        )

    def state(self) -> dict[str, Any]:
        """Return everything that changes in training."""
        parts: dict[str, Any] = {
            "learner": self.learner,
            "optimizer": self.optimizer,
            "average": self.average,
            "scaler": self.scaler,
        }
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {**states, "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a result of `state`."""
        self.learner.load_state_dict(state["learner"])
        restore_optimizer(self.optimizer, state["optimizer"]["state"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.steps = int(state["steps"])


def make_state(setup: Setup, recipe: TrainRecipe | None = None) -> TrainState:
    """Make a fresh student of a setup, ready for the first step.

    Args:
        setup: the batches and the teachers.
        recipe: recipe of the student; defaults to the setup's.
    """
    recipe = recipe or setup.recipe
    student = setup.student(recipe)
    learner = Learner(
        student,
        setup.objective(recipe, student),
        precision=PRECISIONS[recipe.precision],
        compiled=recipe.compile,
        ranks=setup.ranks,
    ).to(setup.device)
    return state_of(learner, recipe, setup.steps_per_epoch)


def state_of(learner: Learner, recipe: TrainRecipe, steps_per_epoch: int) -> TrainState:
    """Make the state of a learner that is on its device, ready for the first step."""
    config = recipe.optimizer
    device = next(learner.parameters()).device
    return TrainState(
        learner,
        make_optimizer(learner, config),
        config,
        steps_per_epoch,
        recipe.epochs,
        recipe.seed,
        None if config.ema is None else averaged(learner.network.module, config.ema),
        torch.amp.GradScaler(device.type) if recipe.precision == "float16" else None,
    )
