"""Training loop of own_loop.py as a Lightning module.

    pip install lightning
    python examples/lightning_module.py cnn.zarr mlp.zarr [--method kd] [--epochs 2] [--seed 0]

Lightning controls the loop, the optimizer's steps and the device. The example provides the learner's loss
and an iterable of batches.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer

from coursepack.data import batches, epoch_order, subset
from coursepack.distill import Learner, Step, make_objective, make_targets, open_teacher_stores
from coursepack.models import build_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coursepack.data import Batch


class EpochBatches:
    """Iterable over the batches of the current epoch; every iteration starts with the first batch.

    A generator is not sufficient: Lightning may start an epoch twice, and a batch would be lost.
    """

    def __init__(self, student: Student) -> None:
        self.student, self.samples, self.batch_size = student, subset(student.teachers.source, limit=None), 64

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        student, teachers, targets = self.student, self.student.teachers, self.student.targets
        epoch = student.current_epoch
        views = [targets.views[epoch % len(targets.views)]]
        order = epoch_order(self.samples, seed=student.seed, epoch=epoch, window=targets.window)
        return batches(
            teachers.source,
            teachers.view,
            order,
            views=views,
            batch_size=self.batch_size,
            device=student.device,
        )


class Student(LightningModule):
    """Lightning module of a student with targets from stores."""

    def __init__(self, stores: list[str], method: str, seed: int) -> None:
        super().__init__()
        self.teachers, self.seed = open_teacher_stores(stores), seed
        student = build_network("digits-small", classes=len(self.teachers.source.class_names), seed=seed)
        self.learner = Learner(student, make_objective(self.teachers, student, method, seed=seed))
        self.losses: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of `distill train` (SGD); a list or dict with a schedule is also possible."""
        return torch.optim.SGD(
            self.learner.parameter_groups(),
            lr=0.05,
            momentum=0.9,
            weight_decay=5e-4,
            nesterov=True,
            fused=True,
        )

    def on_fit_start(self) -> None:
        """Create what depends on the device, which Lightning has selected by now."""
        self.targets = make_targets(self.teachers, self.learner.objective, device=self.device)

    def train_dataloader(self) -> EpochBatches:
        """Return the batches of the current epoch."""
        return EpochBatches(self)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch unchanged; it provides labels and pixels on the device that it was created for."""
        return batch

    def on_train_epoch_start(self) -> None:
        """Freeze or unfreeze modules as the method's phases require."""
        self.learner.begin_epoch(self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss, with the teachers' outputs read from the stores."""
        step = Step(self.current_epoch, batch_idx)
        loss = self.learner(batch, self.targets.fetch(batch), step).value.loss
        self.losses.append(loss.item())
        return loss


def train(stores: list[str], method: str, epochs: int, seed: int) -> list[float]:
    student = Student(stores, method, seed)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(student)
    return student.losses


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
