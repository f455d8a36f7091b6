"""Distillation from stores in a custom PyTorch training loop.

    python examples/own_loop.py cnn.zarr mlp.zarr [--method kd] [--epochs 2] [--seed 0]

The stores are written by `precompute run`, for example by `make demo` in `demo/`. Every step has the same
loss as `distill train` on the same stores with the same seed.
"""

from __future__ import annotations

import argparse

import torch

from coursepack.data import batches, epoch_order, subset
from coursepack.distill import Learner, Step, make_objective, make_targets, open_teacher_stores
from coursepack.models import build_network


def train(stores: list[str], method: str, epochs: int, seed: int) -> list[float]:
    # The stores, with the images and the recipe of views that their teachers saw: checked, never assumed.
    teachers = open_teacher_stores(stores)
    samples = subset(teachers.source, limit=None)

    # A student, and what it is asked to do: method "kd" here, or "amtml" with weights that are learned too.
    student = build_network("digits-small", classes=len(teachers.source.class_names), seed=seed)
    learner = Learner(student, make_objective(teachers, student, method, seed=seed))
    targets = make_targets(teachers, learner.objective)

    optimizer = torch.optim.SGD(
        learner.parameter_groups(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
    )
    losses = []
    for epoch in range(epochs):
        learner.begin_epoch(epoch)
        # One stored view per epoch, in turn. The student sees the very pixels that the teachers saw.
        views = [targets.views[epoch % len(targets.views)]]
        order = epoch_order(samples, seed=seed, epoch=epoch, window=targets.window)
        for number, batch in enumerate(
            batches(teachers.source, teachers.view, order, views=views, batch_size=64)
        ):
            output = learner(batch, targets.fetch(batch), Step(epoch, number))
            optimizer.zero_grad()
            output.value.loss.backward()
            optimizer.step()
            losses.append(output.value.loss.item())
    return losses


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
