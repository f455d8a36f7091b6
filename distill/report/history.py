"""Sections on the course of training: accuracy, losses, teachers, agreement and temperature by epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.report.reading import mean_by_epoch
from coursepack.pages.blocks import (
    Cell,
    Plot,
    Row,
    Section,
    Series,
    Table,
    Text,
    count,
    number,
    percent,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coursepack.distill.report.agreement import Agreement
    from coursepack.distill.report.reading import Epoch, RunGroup
    from coursepack.pages.blocks import Block

NOT_TERMS = {"accuracy", "accuracy_top5", "nll", "calibration_error"}
"""Training metrics that are no part of the loss."""
MAX_CLASSES = 200
"""Maximum number of rows of a table of classes."""
BANDS = "Lines are means over seeds, bands reach from the lowest to the highest seed."


def accuracy_section(groups: Sequence[RunGroup]) -> Section:
    """Return accuracy and negative log-likelihood on the evaluation data by epoch."""
    accuracy = by_epoch(
        groups, lambda line: None if line.evaluation is None else 100 * line.evaluation.accuracy
    )
    nll = by_epoch(groups, lambda line: None if line.evaluation is None else line.evaluation.nll)
    blocks: list[Block] = [Text(BANDS)]
    if accuracy:
        blocks.append(Plot("Accuracy on the evaluation data", "epoch", "accuracy, %", accuracy))
        blocks.append(Plot("Negative log-likelihood on the evaluation data", "epoch", "nats", nll))
    return Section("accuracy", "Accuracy by epoch", tuple(blocks) if accuracy else ())


def losses_section(groups: Sequence[RunGroup]) -> Section:
    """Return the loss and its terms by epoch, one plot for each group."""
    plots = []
    for group in groups:
        names = dict.fromkeys(name for run in group.runs for line in run.epochs for name in line.train)
        terms = [name for name in names if name not in NOT_TERMS]
        series = [_mean(group, style, name, _term(name)) for style, name in enumerate(terms)]
        if shown := tuple(line for line in series if line.x):
            plots.append(Plot(f"Losses of {group.label}", "epoch", "training loss", shown, group.index))
    note = Text(
        "Means over an epoch's training batches and over seeds. The loss is the weighted sum of the terms."
    )
    return Section("losses", "Losses by term", (note, *plots) if plots else ())


def teachers_section(groups: Sequence[RunGroup]) -> Section:
    """Return the weight of every teacher by epoch and by class, for groups that read several teachers."""
    blocks: list[Block] = []
    for group in groups:
        teachers = min((len(line.teachers.weight) for line in _taught(group) if line.teachers), default=0)
        if not teachers:
            continue
        names = _names(group, teachers)
        series = tuple(_mean(group, index, names[index], _weight(index)) for index in range(teachers))
        blocks.append(
            Plot(f"Weights of the teachers of {group.label}", "epoch", "mean weight", series, group.index)
        )
        blocks += [*_by_class(group, names), *_teacher_table(group, names)]
    return Section("teachers", "Weights of the teachers", tuple(blocks))


def agreement_section(groups: Sequence[RunGroup], found: Mapping[int, list[Agreement]]) -> Section:
    """Return agreement with the teachers' mixture by epoch, and with each teacher at the end."""
    agreement = by_epoch(
        groups,
        lambda line: (
            None
            if line.teachers is None or line.teachers.agreement is None
            else 100 * line.teachers.agreement
        ),
    )
    kl = by_epoch(groups, lambda line: None if line.teachers is None else line.teachers.kl)
    blocks: list[Block] = []
    if agreement and kl:
        blocks += [
            Text(
                "Student and weighted mixture of its teachers at temperature 1, on training batches: how "
                "often they predict the same class, and KL(teachers || student)."
            ),
            Plot("Agreement with the teachers", "epoch", "same class, %", agreement),
            Plot("Divergence from the teachers", "epoch", "KL, nats", kl),
        ]
    if rows := [_agreement_row(group, each) for group in groups for each in found.get(group.index, ())]:
        header = ("recipe", "teacher", "same class", "KL, nats", "accuracy of the teacher", "samples")
        caption = "Final student and each teacher at temperature 1, on one stored view of the training data"
        blocks.append(Table(caption, header, tuple(rows)))
    return Section("agreement", "Agreement with the teachers", tuple(blocks))


def _agreement_row(group: RunGroup, each: Agreement) -> Row:
    cells = (
        text(group.label),
        text(each.teacher),
        percent(each.agreement),
        number(each.kl),
        percent(each.teacher_accuracy),
        count(each.samples),
    )
    return Row(cells, group.index)


def temperature_section(groups: Sequence[RunGroup]) -> Section:
    """Return the temperatures by epoch, for methods that choose them per sample or epoch."""
    plots = []
    for group in groups:
        series = tuple(
            _mean(group, style, name, _temperature(key))
            for style, (name, key) in enumerate({"mean": "mean", "lowest": "min", "highest": "max"}.items())
        )
        if series[0].x:
            plots.append(Plot(f"Temperature of {group.label}", "epoch", "temperature", series, group.index))
    note = Text("Temperatures over the samples of an epoch; means over seeds.")
    return Section("temperature", "Temperature", (note, *plots) if plots else ())


def by_epoch(groups: Sequence[RunGroup], value: Callable[[Epoch], float | None]) -> tuple[Series, ...]:
    """Return one line per group: the mean over its runs of a value by number of epochs, with its range."""
    lines = (_mean(group, group.index, group.label, value, group.index) for group in groups)
    return tuple(line for line in lines if line.x)


def _mean(
    group: RunGroup,
    style: int,
    name: str,
    value: Callable[[Epoch], float | None],
    filtered: int | None = None,
) -> Series:
    curves = [
        {line.epoch + 1: float(found) for line in run.epochs if (found := value(line)) is not None}
        for run in group.runs
    ]
    means = mean_by_epoch(curves)
    band = tuple((low, high) for _, low, high in means.values()) if len(group.runs) > 1 else ()
    return Series(name, tuple(means), tuple(mean for mean, _, _ in means.values()), band, style, filtered)


def _term(name: str) -> Callable[[Epoch], float | None]:
    return lambda line: line.train.get(name)


def _temperature(key: str) -> Callable[[Epoch], float | None]:
    return lambda line: None if line.temperature is None else getattr(line.temperature, key)


def _weight(index: int) -> Callable[[Epoch], float | None]:
    return lambda line: (
        line.teachers.weight[index] if line.teachers and index < len(line.teachers.weight) else None
    )


def _taught(group: RunGroup) -> list[Epoch]:
    """Return the epochs of a group's runs that have weights of teachers."""
    lines = [line for run in group.runs for line in run.epochs]
    return [line for line in lines if line.teachers is not None and line.teachers.weight]


def _names(group: RunGroup, teachers: int) -> list[str]:
    names = group.teacher_names
    return names if len(names) == teachers else [f"teacher {index}" for index in range(teachers)]


def _last(group: RunGroup) -> list[Epoch]:
    """Return the last epoch with weights of teachers of each run."""
    lines = [[line for line in run.epochs if line.teachers and line.teachers.weight] for run in group.runs]
    return [each[-1] for each in lines if each]


def _by_class(group: RunGroup, names: list[str]) -> list[Block]:
    """Return the weights by class in the last epoch, unless they are the same for all classes."""
    tables = [line.teachers.weight_by_class for line in _last(group) if line.teachers]
    widths = {len(weights) for table in tables for weights in table}
    if len(widths) != 1 or {len(table) for table in tables} != {len(names)}:
        return []
    classes = range(widths.pop())
    means = [
        [sum(table[teacher][label] for table in tables) / len(tables) for teacher in range(len(names))]
        for label in classes
    ]
    if all(abs(a - b) < 1e-4 for row in means for a, b in zip(row, means[0], strict=True)):
        return []
    kept = sorted(classes, key=lambda label: min(means[label]) - max(means[label]))[:MAX_CLASSES]
    top = max(1e-12, *(abs(weight) for row in means for weight in row))
    rows = tuple(
        Row((text(label), *(number(weight, heat=abs(weight) / top) for weight in means[label])))
        for label in sorted(kept)
    )
    caption = f"Weight of each teacher by class in the last epoch, {group.label}"
    return [Table(caption, ("class", *names), rows, folded=True, group=group.index)]


def _teacher_table(group: RunGroup, names: list[str]) -> list[Block]:
    """Return each teacher's share of wrong and of adjusted samples in the last epoch."""
    lines = [line.teachers for line in _last(group) if line.teachers]
    if not all(len(line.wrong) == len(line.shifted) == len(line.weight) == len(names) for line in lines):
        return []

    def mean(key: str, index: int) -> float:
        return float(sum(getattr(line, key)[index] for line in lines) / len(lines))

    rows = tuple(
        Row(
            (
                Cell(name),
                number(mean("weight", index)),
                percent(mean("wrong", index)),
                percent(mean("shifted", index)),
            )
        )
        for index, name in enumerate(names)
    )
    header = ("teacher", "mean weight", "wrong", "changed by knowledge adjustment")
    caption = f"Teachers of {group.label} in the last epoch, on training batches"
    return [Table(caption, header, rows, group=group.index)]
