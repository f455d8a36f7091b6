"""Training loop of own_loop.py in a Hugging Face Trainer.

    pip install transformers accelerate
    python examples/hf_trainer.py cnn.zarr mlp.zarr [--method kd] [--epochs 2] [--seed 0]

The Trainer controls the loop, the optimizer's steps and the device. The example provides `compute_loss` and
an object with the interface of a dataloader.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from coursepack.data import batches, epoch_order, subset
from coursepack.distill import Learner, Step, make_objective, make_targets, open_teacher_stores
from coursepack.models import build_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coursepack.distill import CachedTargets, TeacherStores


class Epochs:
    """Dataloader interface for a Trainer: the number of batches, and the batches of the current epoch."""

    def __init__(
        self,
        teachers: TeacherStores,
        learner: Learner,
        targets: CachedTargets,
        seed: int,
        device: torch.device,
    ) -> None:
        self.teachers, self.learner, self.targets = teachers, learner, targets
        self.seed, self.device, self.batch_size = seed, device, 64
        self.samples = subset(teachers.source, limit=None)
        self.set_epoch(0)

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, and freeze or unfreeze modules as the method's phases require."""
        self.epoch = epoch
        self.learner.begin_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        teachers, targets = self.teachers, self.targets
        views = [targets.views[self.epoch % len(targets.views)]]
        order = epoch_order(self.samples, seed=self.seed, epoch=self.epoch, window=targets.window)
        stream = batches(
            teachers.source, teachers.view, order, views=views, batch_size=self.batch_size, device=self.device
        )
        for number, batch in enumerate(stream):
            yield {"batch": batch, "step": Step(self.epoch, number)}


class StudentTrainer(Trainer):
    """Trainer of a learner with targets from stores."""

    def __init__(self, teachers: TeacherStores, seed: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.targets = make_targets(teachers, self.model.objective, device=self.args.device)
        self.epochs = Epochs(teachers, self.model, self.targets, seed, self.args.device)
        self.losses: list[float] = []

    def get_train_dataloader(self) -> Epochs:
        """Return the batches, which are neither collated nor moved to a device."""
        return self.epochs

    def compute_loss(
        self, model: Learner, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Return the loss, with the teachers' outputs read from the stores."""
        output = model(inputs["batch"], self.targets.fetch(inputs["batch"]), inputs["step"])
        self.losses.append(output.value.loss.item())
        return (output.value.loss, output) if return_outputs else output.value.loss


def train(stores: list[str], method: str, epochs: int, seed: int) -> list[float]:
    teachers = open_teacher_stores(stores)
    student = build_network("digits-small", classes=len(teachers.source.class_names), seed=seed)
    learner = Learner(student, make_objective(teachers, student, method, seed=seed))
    optimizer = torch.optim.SGD(
        learner.parameter_groups(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            lr_scheduler_type="constant",  # the default decays to zero
            max_grad_norm=0,  # the default clips gradients to norm 1
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = StudentTrainer(teachers, seed, model=learner, args=settings, optimizers=(optimizer, None))
        trainer.train()
    return trainer.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", nargs="+", help="stores of the teachers")
    parser.add_argument("--method", default="kd", help="see `distill methods`")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the samples")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and order")
    chosen = parser.parse_args()
    losses = train(chosen.stores, chosen.method, chosen.epochs, chosen.seed)
    print(f"{chosen.method}: {len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
