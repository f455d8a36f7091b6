"""The training loop over the batches of an epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.distill.losses.base import Step
from coursepack.distill.training.metrics import EpochMetrics
from coursepack.distill.training.step import train_step
from coursepack.errors import TrainingDiverged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from coursepack.data import Batch
    from coursepack.distill.targets.stores import Targets, TargetSource
    from coursepack.distill.training.learner import LearnerOutput
    from coursepack.distill.training.state import TrainState


def train_epoch(
    states: Sequence[TrainState],
    batches: Iterable[Batch],
    targets: TargetSource | None,
    epoch: int = 0,
    *,
    micro_batches: int = 1,
) -> list[dict[str, Any]]:
    """Train every student once on each batch, and return each one's metrics."""
    metrics = [new_metrics(state) for state in states]
    for _ in train_steps(states, batches, targets, metrics, epoch, micro_batches=micro_batches):
        pass
    return [each.means() for each in metrics]


def train_steps(
    states: Sequence[TrainState],
    batches: Iterable[Batch],
    targets: TargetSource | None,
    metrics: Sequence[EpochMetrics],
    epoch: int = 0,
    *,
    micro_batches: int = 1,
    first: int = 0,
) -> Iterator[int]:
    """Train on the batches of an epoch, or on what is left of them, one step at a time.

    Args:
        states: the students; all see the same batches, and none learns from another.
        batches: batches of the epoch, from the first that is not done.
        targets: source of the teachers' targets; None where no objective needs them.
        metrics: each student's metrics of the epoch, which are added to.
        epoch: index of the epoch.
        micro_batches: number of parts that each batch is worked through in.
        first: index of the first batch.

    Yields:
        After every step, the number of batches of the epoch that are done.
    """
    by_state = {id(state): each for state, each in zip(states, metrics, strict=True)}
    groups = [[state] for state in states]

    def fetch(rows: Batch, step: Step) -> Targets | None:
        return None if targets is None else targets.fetch(rows, teachers_read(states, step))

    def log(state: TrainState, output: LearnerOutput, rows: Batch) -> None:
        by_state[id(state)].add(output, rows)

    for state in states:
        state.learner.train()
        state.learner.begin_epoch(epoch)
    for index, batch in enumerate(batches, first):
        try:
            train_step(groups, batch, fetch, Step(epoch, index), micro_batches=micro_batches, log=log)
        except TrainingDiverged:
            check_targets(targets, np.unique(batch.view).tolist())
            raise
        yield index + 1


def check_targets(targets: TargetSource | None, views: Sequence[int]) -> None:
    """Refuse targets that are the cause of a loss that is not finite.

    Raises:
        StoreDamaged: files of a store were changed while they were read.
        NonFiniteOutput: targets are not finite.
    """
    if targets is not None:
        targets.check_unchanged()
        targets.check_finite(views)


def new_metrics(state: TrainState) -> EpochMetrics:
    """Return empty metrics of an epoch for a student."""
    learner = state.learner
    return EpochMetrics(learner.objective.context.teachers, learner.ranks)


def teachers_read(states: Sequence[TrainState], step: Step) -> list[int] | None:
    """Return the indices of the teachers that any of the students reads for a batch; None means all."""
    chosen = {state.learner.objective.chosen_teacher(step) for state in states}
    indices = [index for index in chosen if index is not None]
    return sorted(indices) if len(indices) == len(chosen) else None
