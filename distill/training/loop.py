"""Training loop over the batches of an epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.distill.losses.base import Step
from coursepack.distill.training.ahead import copied_ahead
from coursepack.distill.training.metrics import EpochMetrics
from coursepack.distill.training.step import train_step
from coursepack.errors import TrainingDiverged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from coursepack.data import Batch
    from coursepack.distill.targets.base import Targets, TargetSource
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
    """Train students that are independent of each other on each batch, and return the metrics of each."""
    metrics = [new_metrics(state) for state in states]
    groups = [[state] for state in states]
    for _ in train_steps(groups, batches, targets, metrics, epoch, micro_batches=micro_batches):
        pass
    return [each.means() for each in metrics]


def train_steps(
    groups: Sequence[Sequence[TrainState]],
    batches: Iterable[Batch],
    targets: TargetSource | None,
    metrics: Sequence[EpochMetrics],
    epoch: int = 0,
    *,
    micro_batches: int = 1,
    first: int = 0,
) -> Iterator[int]:
    """Train on the batches of an epoch, or on the rest of it, one step at a time.

    Args:
        groups: students that learn from each other; groups are independent and share the batches.
        batches: batches of the epoch, starting with batch `first`.
        targets: source of the teachers' targets; None if no objective reads teachers.
        metrics: metrics of each student of all groups, updated in every step.
        epoch: index of the epoch.
        micro_batches: number of micro-batches that each batch is split into.
        first: index of the first batch.

    Yields:
        The number of completed batches of the epoch, after every step.
    """
    states = [state for group in groups for state in group]
    by_state = {id(state): each for state, each in zip(states, metrics, strict=True)}

    def fetch(rows: Batch, step: Step) -> Targets | None:
        return None if targets is None else targets.fetch(rows, teachers_read(states, step))

    def log(state: TrainState, output: LearnerOutput, rows: Batch) -> None:
        by_state[id(state)].add(output, rows)

    for state in states:
        state.learner.train(not state.is_frozen)
        state.learner.begin_epoch(epoch)
    whole = micro_batches == 1
    copied, fetch_copied = copied_ahead(states, batches, targets, fetch, epoch, first, whole=whole)
    for index, batch in enumerate(copied, first):
        try:
            train_step(groups, batch, fetch_copied, Step(epoch, index), micro_batches=micro_batches, log=log)
        except TrainingDiverged:
            check_targets(targets, np.unique(batch.view).tolist())
            raise
        yield index + 1


def check_targets(targets: TargetSource | None, views: Sequence[int]) -> None:
    """Check whether the teachers' targets are the cause of a loss that is not finite.

    Raises:
        StoreDamaged: files of a store were changed while they were read.
        NonFiniteOutput: targets of the given views are not finite.
    """
    if targets is not None:
        targets.check_unchanged()
        targets.check_finite(views)


def new_metrics(state: TrainState) -> EpochMetrics:
    """Return empty epoch metrics for a student."""
    learner = state.learner
    return EpochMetrics(learner.objective.context.teachers, learner.ranks)


def teachers_read(states: Sequence[TrainState], step: Step) -> list[int] | None:
    """Return the indices of the teachers that at least one student reads in a step; None means all."""
    return _union([state.learner.objective.teachers_read(step) for state in states])


def teachers_of_epoch(states: Sequence[TrainState], epoch: int) -> list[int] | None:
    """Return the indices of the teachers that at least one student may read in an epoch; None means all."""
    return _union([state.learner.objective.teachers_of_epoch(epoch) for state in states])


def _union(read: Sequence[tuple[int, ...] | None]) -> list[int] | None:
    indices: set[int] = set()
    for each in read:
        if each is None:
            return None
        indices.update(each)
    return sorted(indices)
