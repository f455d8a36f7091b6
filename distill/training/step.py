"""Training step in three parts: predict, exchange, and loss with backward pass.

A group is a student and its peers, which learn from each other; a student that trains alone is a group of
one. Groups share the batches and the teachers' targets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from coursepack.distill.exchange.base import Exchanged, ExchangeInputs
from coursepack.distill.losses.base import Step
from coursepack.distill.training.learner import LearnerOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.distill.losses.base import LossInputs, StudentOutput
    from coursepack.distill.objective import ObjectiveValue
    from coursepack.distill.targets.base import Targets
    from coursepack.distill.training.state import TrainState
    from coursepack.models import Network

    Group = Sequence[TrainState]
    Fetch = Callable[[Batch, Step], Targets | None]
    Log = Callable[[TrainState, LearnerOutput, Batch], None]
    Seen = list[tuple[TrainState, LossInputs]]


def train_step(
    groups: Sequence[Group], batch: Batch, fetch: Fetch, step: Step, *, micro_batches: int = 1, log: Log
) -> None:
    """Update every student once on one batch.

    Args:
        groups: groups of students that learn from each other.
        batch: rows to train on.
        fetch: returns the teachers' targets for some rows; called once for rows that several students share,
            unless students of a group are updated one after another.
        step: epoch and batch.
        micro_batches: number of micro-batches that the batch is split into.
        log: called with each student's state, output and rows for every micro-batch.
    """
    parts = batch.split(micro_batches) if micro_batches > 1 else [batch]
    micros = [(part, Step(step.epoch, step.batch, index)) for index, part in enumerate(parts)]
    for group in groups:
        for state in group:
            state.begin_step()
        if hasattr(group[0].learner.exchange, "begin_step"):
            group[0].learner.exchange.begin_step(group[0].steps)
    seen: Seen = []
    together = [group for group in groups if not _is_sequential(group)]
    for micro, now in micros:
        targets = _fetch_once([state for group in together for state in group], micro, fetch, now)
        for group in together:
            outputs = predict(group, micro, now)
            fetched = [targets[id(state.learner.rows_for(micro))] for state in group]
            inputs, losses = exchange(group, micro, outputs, fetched, now)
            _backward(group, inputs, losses, micro, batch, log, seen)
    for group in together:
        for state in group:
            state.end_step()
        _second_step(group, micros, batch)
    for group in groups:
        if _is_sequential(group):
            _one_by_one(group, micros, batch, fetch, log, seen)
    for state, each in seen:
        state.learner.objective.after_step(each)


def predict(group: Group, batch: Batch, step: Step) -> list[StudentOutput]:
    """Return the output of each student for a batch."""
    return [_predict(state, batch, step) for state in group]


def exchange(
    group: Group,
    batch: Batch,
    outputs: Sequence[StudentOutput],
    targets: Sequence[Targets | None],
    step: Step,
) -> tuple[list[LossInputs], Sequence[Mapping[str, Tensor]]]:
    """Return the loss inputs of each student, and further losses of each from the exchange.

    The inputs are its own output, the teachers' targets and what the exchange makes of all outputs.
    """
    rows = group[0].learner.rows_for(batch)
    outputs = [state.learner.gathered(batch, output) for state, output in zip(group, outputs, strict=True)]
    module = group[0].learner.exchange
    if module is None:
        exchanged = Exchanged(((),) * len(group))
    else:
        heard = outputs
        if _mode(group) == "eval":
            heard = [
                state.learner.gathered(batch, _predict_for_others(state, batch, step, "eval"))
                for state in group
            ]

        def predict(network: Network, index: int) -> Tensor:
            return group[index].learner.logits_of(network, batch)

        exchanged = module(ExchangeInputs(tuple(heard), rows.labels, step, predict))
    inputs = [
        state.learner.inputs(batch, output, target, step, peers)
        for state, output, target, peers in zip(group, outputs, targets, exchanged.targets, strict=True)
    ]
    return inputs, exchanged.losses


def _backward(
    group: Group,
    inputs: Sequence[LossInputs],
    losses: Sequence[Mapping[str, Tensor]],
    micro: Batch,
    batch: Batch,
    log: Log,
    seen: Seen,
) -> None:
    """Compute the losses of a group's students, and accumulate their gradients in one backward pass."""
    results = []
    for index, (state, each) in enumerate(zip(group, inputs, strict=True)):
        rows, learner = state.learner.rows_for(micro), state.learner
        value = learner.objective(each)
        if losses and losses[index]:
            value = _with_losses(value, losses[index])
        if value.loss.requires_grad:
            results.append(state.scaled(value.loss, _share(learner.ranks.count, rows, micro, batch)))
        log(state, LearnerOutput(each.student.logits, value), rows)
        if learner.objective.keeps_memory:
            seen.append((state, each))
    torch.autograd.backward(results)


def _with_losses(value: ObjectiveValue, losses: Mapping[str, Tensor]) -> ObjectiveValue:
    total = torch.stack([value.loss, *losses.values()]).sum()
    return replace(
        value, loss=total, terms=value.terms | {name: each.detach() for name, each in losses.items()}
    )


def _one_by_one(
    group: Group, micros: Sequence[tuple[Batch, Step]], batch: Batch, fetch: Fetch, log: Log, seen: Seen
) -> None:
    """Update the peers one after another and then the student, each from the others' current weights."""
    module, mode = group[0].learner.exchange, _mode(group)
    assert module is not None
    for index in (*range(1, len(group)), 0):
        state = group[index]
        for micro, now in micros:
            rows = state.learner.rows_for(micro)
            outputs = [
                _predict(each, micro, now) if each is state else _predict_for_others(each, micro, now, mode)
                for each in group
            ]
            outputs = [each.learner.gathered(micro, own) for each, own in zip(group, outputs, strict=True)]
            peers = module(ExchangeInputs(tuple(outputs), rows.labels, now)).targets[index]
            inputs = state.learner.inputs(micro, outputs[index], fetch(rows, now), now, peers)
            _backward([state], [inputs], (), micro, batch, log, seen)
        state.end_step()


def _second_step(group: Group, micros: Sequence[tuple[Batch, Step]], batch: Batch) -> None:
    """Minimize the exchange's second losses in a step of their own, if it has any."""
    module = group[0].learner.exchange
    if group[0].second is None or module is None:
        return
    for state in group:
        state.optimizer.zero_grad(set_to_none=True)
    for micro, now in micros:
        outputs = [state.learner.gathered(micro, _predict(state, micro, now)) for state in group]
        rows = group[0].learner.rows_for(micro)
        losses = module.second_step(ExchangeInputs(tuple(outputs), rows.labels, now))
        share = _share(group[0].learner.ranks.count, rows, micro, batch)
        trained = [loss for of_one in losses for loss in of_one.values() if loss.requires_grad]
        torch.autograd.backward([loss * share for loss in trained])
    for state in group:
        if not state.is_frozen:
            state.end_second_step()


def _fetch_once(
    states: Sequence[TrainState], micro: Batch, fetch: Fetch, step: Step
) -> dict[int, Targets | None]:
    """Return the teachers' targets for the rows of all students, by the identity of the rows."""
    rows = {id(each): each for each in (state.learner.rows_for(micro) for state in states)}
    return {key: fetch(each, step) for key, each in rows.items()}


def _predict(state: TrainState, batch: Batch, step: Step) -> StudentOutput:
    state.seed_step(batch.device, step.micro_batch)
    with torch.set_grad_enabled(not state.is_frozen):
        return state.learner.predict(batch)


def _predict_for_others(state: TrainState, batch: Batch, step: Step, mode: str) -> StudentOutput:
    """Return a student's output that others follow, without gradient and without changing its buffers."""
    module, buffers = state.learner.network.module, list(state.learner.buffers())
    was_training, before = module.training, [buffer.clone() for buffer in buffers]
    module.train(was_training and mode == "train")
    state.seed_step(batch.device, step.micro_batch)
    with torch.no_grad():
        output = state.learner.predict(batch)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    module.train(was_training)
    return output


def _is_sequential(group: Group) -> bool:
    return len(group) > 1 and group[0].learner.objective.config.exchange.is_sequential


def _mode(group: Group) -> str:
    return getattr(group[0].learner.objective.config.exchange, "mode", "train")


def _share(ranks: int, rows: Batch, micro: Batch, batch: Batch) -> float:
    """Return the factor of a micro-batch's mean loss.

    It makes the mean over ranks of the sum over micro-batches equal to the mean over all rows.
    """
    if rows.global_batch is None:
        return len(micro) / len(batch)
    return ranks * len(micro) / len(rows.global_batch)
