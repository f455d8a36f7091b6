"""A trainee: a learner, what updates it, and one step of training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data.randomness import Purpose, random_words
from coursepack.distill.learning_rate import rate_factor
from coursepack.distill.optimiser import OptimiserConfig, averaged, make_optimiser, restore_optimiser

if TYPE_CHECKING:
    from torch.optim.swa_utils import AveragedModel

    from coursepack.data import Batch
    from coursepack.distill.facts import Moment
    from coursepack.distill.learner import Learner, LearnerOutput
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.targets import Targets
    from coursepack.models import Network

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Trainee:
    """A learner and what updates it. Use `make_trainee` for one of a recipe."""

    learner: Learner
    optimiser: torch.optim.Optimizer
    config: OptimiserConfig = field(default_factory=OptimiserConfig)
    steps_per_epoch: int = 1
    epochs: int = 1
    seed: int = 0
    average: AveragedModel | None = None
    scaler: torch.amp.GradScaler | None = None
    steps: int = 0
    """Updates made so far."""

    @property
    def network(self) -> Network:
        """What is evaluated and kept: the student, or its average."""
        network = self.learner.network
        return network if self.average is None else replace(network, module=self.average.module)

    def begin_step(self) -> None:
        """Set the learning rate; forget the last step's gradients."""
        rate = self.config.lr * rate_factor(
            self.config.schedule, self.steps, self.steps_per_epoch, self.epochs
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)

    def add_gradient(
        self, batch: Batch, targets: Targets | None, moment: Moment, share: float = 1.0
    ) -> LearnerOutput:
        """Forward and backward of a batch, or of the given share of one."""
        self._seed(batch.device, moment.part)
        output: LearnerOutput = self.learner(batch, targets, moment)
        loss = output.value.loss if share == 1.0 else output.value.loss * share
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        return output

    def end_step(self) -> None:
        """Update the parameters, and their average, by the mean of all ranks' gradients.

        Buffers (running statistics of batch normalisation) become those of the first rank, as in
        DistributedDataParallel.
        """
        ranks = self.learner.ranks
        ranks.average_gradients(self.learner.parameters())
        ranks.copy_first(self.learner.buffers())
        if self.scaler is not None and self.config.clip is not None:
            self.scaler.unscale_(self.optimiser)
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.clip)
        is_left_out = False
        if self.scaler is None:
            self.optimiser.step()
        else:
            self.scaler.step(self.optimiser)
            is_left_out = self._update_scale()
        if self.average is not None and not is_left_out:
            self.average.update_parameters(self.learner.network.module)
        self.steps += 1

    def _update_scale(self) -> bool:
        """Adjust the scale of float16's gradients; returns whether their overflow left the step out."""
        assert self.scaler is not None
        if self.average is None:  # reading the scale waits for the device
            self.scaler.update()
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        return self.scaler.get_scale() < before  # it falls after an overflow, and only then

    def _seed(self, device: torch.device, part: int) -> None:
        """What the network draws (dropout) depends on seed, step, part and rank, not on what ran before."""
        ranks = self.learner.ranks
        place = part * ranks.count + ranks.index
        words = random_words(self.seed, np.array([self.steps]), place, Purpose.STEP)[0]
        seed = int(words[:2].view(np.int64)[0])
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def agree(self) -> None:
        """Begin with the first rank's weights."""
        modules = [self.learner, *([] if self.average is None else [self.average])]
        self.learner.ranks.copy_first(
            value for module in modules for value in (*module.parameters(), *module.buffers())
        )

    def state(self) -> dict[str, Any]:
        """Everything that changes while it trains."""
        parts: dict[str, Any] = {
            "learner": self.learner,
            "optimiser": self.optimiser,
            "average": self.average,
            "scaler": self.scaler,
        }
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {**states, "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.learner.load_state_dict(state["learner"])
        restore_optimiser(self.optimiser, state["optimiser"]["state"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.steps = int(state["steps"])


def make_trainee(learner: Learner, recipe: TrainRecipe, steps_per_epoch: int) -> Trainee:
    """A recipe's trainee: the learner on its device, ready for the first step."""
    module, config = learner.network.module, recipe.optimiser
    device = next(learner.parameters()).device
    average = None if config.ema is None else averaged(module, config.ema)
    return Trainee(
        learner,
        make_optimiser(learner, config),
        config,
        steps_per_epoch,
        recipe.epochs,
        recipe.seed,
        average,
        torch.amp.GradScaler(device.type) if recipe.precision == "float16" else None,
    )
