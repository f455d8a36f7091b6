"""One training step in three parts: predict, exchange, loss and backward.

A group of students learns from each other; a student that learns from no other is a group of its own. Groups
of one run may share their batches and the teachers' targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.losses.base import Step
from coursepack.distill.training.learner import LearnerOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coursepack.data import Batch
    from coursepack.distill.losses.base import LossInputs, StudentOutput
    from coursepack.distill.targets.stores import Targets
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
    """Update every student once, on one batch.

    Args:
        groups: the students, in groups that learn from each other.
        batch: their rows.
        fetch: returns the teachers' targets for rows; called once for rows that several students share.
        step: epoch and batch.
        micro_batches: number of parts that the batch is worked through in.
        log: called with every student's output for every micro-batch.
    """
    states = [state for group in groups for state in group]
    for state in states:
        state.begin_step()
    seen: list[tuple[TrainState, LossInputs]] = []
    for index, part in enumerate(batch.split(micro_batches) if micro_batches > 1 else [batch]):
        now = Step(step.epoch, step.batch, index)
        rows_of = {id(state): state.learner.rows_for(part) for state in states}
        targets = {id(rows): fetch(rows, now) for rows in {id(r): r for r in rows_of.values()}.values()}
        for group in groups:
            outputs = predict(group, part, now)
            fetched = [targets[id(rows_of[id(state)])] for state in group]
            for state, inputs in zip(group, exchange(group, part, outputs, fetched, now), strict=True):
                rows = rows_of[id(state)]
                value = state.learner.objective(inputs)
                state.backward(value.loss, _share(state.learner.ranks.count, rows, part, batch))
                log(state, LearnerOutput(inputs.student.logits, value), rows)
                if state.learner.objective.keeps_memory:
                    seen.append((state, inputs))
    for state in states:
        state.end_step()
    for state, inputs in seen:
        state.learner.objective.after_step(inputs)


def predict(group: Group, batch: Batch, step: Step) -> list[StudentOutput]:
    """Return each student's output for a batch."""
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
    """Return each student's loss inputs: its own output, its teachers' targets, and the outputs of its peers.

    Peers' outputs are detached, and are passed only to objectives that read them.
    """
    found = []
    for index, (state, output, target) in enumerate(zip(group, outputs, targets, strict=True)):
        others = [each for other, each in enumerate(outputs) if other != index]
        reads = bool(state.learner.objective.needs.peers)
        peers = tuple(each.map(lambda value: value.detach()) for each in others) if reads else ()
        found.append(state.learner.inputs(batch, output, target, step, peers))
    return found


def _share(ranks: int, rows: Batch, part: Batch, batch: Batch) -> float:
    """Return the factor of a micro-batch's loss.

    With it, the mean over ranks of the sum over micro-batches is the mean over all rows.
    """
    return len(part) / len(batch) if rows.global_batch is None else ranks * len(part) / len(rows.global_batch)
