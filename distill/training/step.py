"""Training step in three parts: predict, exchange, and loss with backward pass.

Students of one group learn from each other; a student that learns independently is a group of one. Groups
share the batches and the teachers' targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.losses.base import Step
from coursepack.distill.training.learner import LearnerOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coursepack.data import Batch
    from coursepack.distill.losses.base import LossInputs, StudentOutput
    from coursepack.distill.targets.base import Targets
    from coursepack.distill.training.state import TrainState

    Group = Sequence[TrainState]


def train_step(
    groups: Sequence[Group],
    batch: Batch,
    fetch: Callable[[Batch, Step], Targets | None],
    step: Step,
    *,
    micro_batches: int = 1,
    log: Callable[[TrainState, LearnerOutput, Batch], None],
) -> None:
    """Update every student once on one batch.

    Args:
        groups: groups of students that learn from each other.
        batch: rows to train on.
        fetch: returns the teachers' targets for some rows; called once for rows that several students share.
        step: epoch and batch.
        micro_batches: number of micro-batches that the batch is split into.
        log: called with each student's state, output and rows for every micro-batch.
    """
    states = [state for group in groups for state in group]
    for state in states:
        state.begin_step()
    seen: list[tuple[TrainState, LossInputs]] = []
    for index, micro in enumerate(batch.split(micro_batches) if micro_batches > 1 else [batch]):
        now = Step(step.epoch, step.batch, index)
        rows_of = {id(state): state.learner.rows_for(micro) for state in states}
        targets = {id(rows): fetch(rows, now) for rows in {id(r): r for r in rows_of.values()}.values()}
        for group in groups:
            outputs = predict(group, micro, now)
            fetched = [targets[id(rows_of[id(state)])] for state in group]
            for state, inputs in zip(group, exchange(group, micro, outputs, fetched, now), strict=True):
                rows = rows_of[id(state)]
                value = state.learner.objective(inputs)
                state.backward(value.loss, _share(state.learner.ranks.count, rows, micro, batch))
                log(state, LearnerOutput(inputs.student.logits, value), rows)
                if state.learner.objective.keeps_memory:
                    seen.append((state, inputs))
    for state in states:
        state.end_step()
    for state, inputs in seen:
        state.learner.objective.after_step(inputs)


def predict(group: Group, batch: Batch, step: Step) -> list[StudentOutput]:
    """Return the output of each student for a batch."""
    outputs = []
    for state in group:
        state.seed_step(batch.device, step.micro_batch)
        outputs.append(state.learner.predict(batch))
    return outputs


def exchange(
    group: Group,
    batch: Batch,
    outputs: Sequence[StudentOutput],
    targets: Sequence[Targets | None],
    step: Step,
) -> list[LossInputs]:
    """Return the loss inputs of each student: its output, the teachers' targets and its peers' outputs.

    Peers' outputs are detached, and passed only to objectives that read them.
    """
    inputs = []
    for index, (state, output, target) in enumerate(zip(group, outputs, targets, strict=True)):
        others = [each for other, each in enumerate(outputs) if other != index]
        reads = bool(state.learner.objective.needs.peers)
        peers = tuple(each.map(lambda value: value.detach()) for each in others) if reads else ()
        inputs.append(state.learner.inputs(batch, output, target, step, peers))
    return inputs


def _share(ranks: int, rows: Batch, micro: Batch, batch: Batch) -> float:
    """Return the factor of a micro-batch's mean loss.

    It makes the mean over ranks of the sum over micro-batches equal to the mean over all rows.
    """
    if rows.global_batch is None:
        return len(micro) / len(batch)
    return ranks * len(micro) / len(rows.global_batch)
