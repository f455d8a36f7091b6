"""The lines in which a run states the values that it trains with, how much it will read, and its warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.console import byte_size
from coursepack.distill.schedule import Schedule
from coursepack.distill.setup.classes import class_warnings
from coursepack.distill.setup.fidelity import temperature_warnings
from coursepack.distill.targets.stores import CachedTargets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store import StoreReader
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.setup.prepare import Setup


def describe_training(recipe: TrainRecipe, setup: Setup) -> str:
    """Return optimizer, learning rate, batch size, temperature and evaluation data in one line."""
    optimizer = recipe.optimizer
    parts = [
        f"{optimizer.name} with learning rate {optimizer.lr:g} ({optimizer.schedule.shape})",
        f"batch size {recipe.batch_size}",
    ]
    if recipe.objective.needs().fused:
        parts.append(f"temperature {_text(recipe.objective.temperature)}")
    parts.append(f"evaluated on {setup.evaluation.name} ({len(setup.evaluation.labels):,} samples)")
    return ", ".join(parts)


def describe_work(setup: Setup) -> list[str]:
    """Return lines with a run's number of steps, and the bytes that it reads from each store."""
    epochs, steps = setup.recipe.epochs, setup.steps_per_epoch
    lines = [f"{epochs:,} epochs of {steps:,} steps, {epochs * steps:,} steps in all"]
    if not isinstance(setup.targets, CachedTargets):
        return [*lines, "nothing is read from stores"]
    per_epoch = len(setup.samples) * setup.recipe.views_per_load
    in_all = 0
    for reader, names in zip(setup.targets.readers, setup.targets.arrays, strict=True):
        row = sum(reader.manifest.arrays[name].row_bytes for name in names)
        in_all += row * per_epoch
        lines.append(
            f"{reader.name}: {', '.join(names) or 'nothing'}, {row:,} bytes a sample, "
            f"{byte_size(row * per_epoch)} per epoch"
        )
    return [
        *lines,
        f"stores in all: {byte_size(in_all)} per epoch, {byte_size(in_all * epochs)} in {epochs:,} epochs",
    ]


def warnings_of(recipe: TrainRecipe, readers: Sequence[StoreReader]) -> list[str]:
    """Return the warnings about a recipe's stores."""
    return [*temperature_warnings(recipe, readers), *class_warnings(recipe, readers)]


def _text(value: float | Schedule) -> str:
    if isinstance(value, Schedule):
        return f"{value.start:g} to {value.end:g} in {value.epochs} epochs ({value.shape})"
    return f"{value:g}"
