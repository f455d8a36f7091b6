"""Sections on finished runs: the table of results, classes, confusions and calibration."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import numpy as np

from coursepack.distill.runs.compare import EXTRAS
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
    points,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from coursepack.distill.report.predictions import Predictions
    from coursepack.distill.report.reading import RunGroup
    from coursepack.distill.runs.compare import Group

LARGEST_MATRIX = 20
"""Maximum number of classes of a confusion matrix; with more, the most frequent confusions are listed."""
MAX_CONFUSIONS = 30
MAX_CLASSES = 200
"""Maximum number of rows of the table of classes."""


def results_section(groups: Sequence[RunGroup]) -> Section:
    """Return the table of `distill compare` with paired intervals, and the accuracy of every seed."""
    finished = [(group, group.compared) for group in groups if group.compared is not None]
    if not finished:
        return Section("results", "Results", ())
    first = finished[0][1]
    extras = [name for name in EXTRAS if any(name in compared.extras for _, compared in finished)]
    header = (
        *("recipe", "runs", "accuracy", "±\u00a0sd", "difference", "95 % interval", "beats first", "nll"),
        *(EXTRAS[name][1] for name in extras),
    )
    rows = tuple(
        Row((*_result(compared, first), *(number(compared.extras.get(name)) for name in extras)), group.index)
        for group, compared in finished
    )
    seeds = sorted({seed for _, compared in finished for seed in compared.accuracy})
    by_seed = tuple(
        Row((text(group.label), *(percent(compared.accuracy.get(seed)) for seed in seeds)), group.index)
        for group, compared in finished
    )
    evaluation = finished[0][0].recipe.evaluation
    blocks = (
        Text(
            f"On {evaluation}, after the last epoch. The difference is the mean difference in accuracy from "
            "the first row, over the seeds that both have, in percentage points. The interval is that of a "
            "paired t test: it covers the choice of the seed, not that of the evaluation data."
        ),
        Table("Results", header, rows),
        Table("Accuracy of every seed", ("recipe", *map(str, seeds)), by_seed, folded=True),
    )
    return Section("results", "Results", blocks)


def _result(group: Group, first: Group) -> tuple[Cell, ...]:
    mean, low, high = paired_interval(first.accuracy, group.accuracy)
    is_first = group is first
    interval = Cell("-") if is_first or low is None or high is None else _interval(low, high)
    return (
        text(group.label),
        count(len(group.accuracy)),
        percent(group.mean),
        percent(None if math.isnan(group.spread) else group.spread),
        points(None if is_first else mean),
        interval,
        Cell("-") if group.wins is None else Cell(f"{group.wins} of {group.paired}", float(group.wins)),
        number(statistics.fmean(group.nll.values())),
    )


def _interval(low: float, high: float) -> Cell:
    return Cell(f"{100 * low:+.2f} to {100 * high:+.2f}", low)


def paired_interval(
    first: Mapping[int, float], other: Mapping[int, float]
) -> tuple[float | None, float | None, float | None]:
    """Return the mean difference over the seeds of both, and its 95 % interval by Student's t.

    The mean is None without a common seed, the interval with fewer than two.

    >>> paired_interval({0: 0.5, 1: 0.5}, {0: 0.6, 2: 0.9})
    (0.09999999999999998, None, None)
    """
    from scipy.special import stdtrit

    pairs = [other[seed] - first[seed] for seed in sorted(first.keys() & other.keys())]
    if not pairs:
        return None, None, None
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return mean, None, None
    half = float(stdtrit(len(pairs) - 1, 0.975)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return mean, mean - half, mean + half


def classes_section(groups: Sequence[RunGroup], found: Mapping[int, Predictions]) -> Section:
    """Return the accuracy of the first group by class, and what the others gained or lost."""
    shown = [group for group in groups if group.index in found]
    if not shown or len({found[group.index].class_names for group in shown}) > 1:
        return Section("classes", "Classes", ())
    first, *others = shown
    names, base = found[first.index].class_names, found[first.index].class_accuracy
    samples = found[first.index].confusion.sum(1) // len(first.runs)
    gains = {group.index: found[group.index].class_accuracy - base for group in others}
    blocks: list[Text | Table] = []
    for group in others:
        gain = gains[group.index][samples > 0]
        blocks.append(
            Text(
                f"{group.label}: better in {int((gain > 0).sum())} classes, worse in "
                f"{int((gain < 0).sum())}, equal in {int((gain == 0).sum())}."
            )
        )
    widest = max((float(np.nanmax(np.abs(gain), initial=0)) for gain in gains.values()), default=0) or 1.0
    rows = tuple(
        Row(
            (
                text(names[label]),
                count(int(samples[label])),
                percent(_known(base[label])),
                *(_gain(gains[group.index][label], widest) for group in others),
            )
        )
        for label in _most_changed(list(gains.values()), len(names))
    )
    header = (
        "class",
        "samples",
        f"accuracy of {first.label}",
        *(f"change: {group.label}" for group in others),
    )
    caption = "Accuracy by class, and its change from the first in percentage points"
    return Section("classes", "Classes gained and lost", (*blocks, Table(caption, header, rows)))


def _most_changed(gains: list[NDArray[np.float64]], classes: int) -> list[int]:
    if classes <= MAX_CLASSES:
        return list(range(classes))
    change = np.nanmax(np.abs(gains), axis=0) if gains else np.zeros(classes)
    return sorted(np.argsort(-np.nan_to_num(change), kind="stable")[:MAX_CLASSES].tolist())


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _gain(value: float, widest: float) -> Cell:
    known = _known(value)
    return points(known, heat=None if known is None else max(0.0, known) / widest)


def confusion_section(groups: Sequence[RunGroup], found: Mapping[int, Predictions]) -> Section:
    """Return the confusion matrix of every group; for many classes, its most frequent confusions."""
    tables = [_confusion(group, found[group.index]) for group in groups if group.index in found]
    note = Text("Counts over all seeds. Rows are labels, columns predictions.")
    return Section("confusion", "Confusion matrices", (note, *tables) if tables else ())


def _confusion(group: RunGroup, part: Predictions) -> Table:
    names, matrix = part.class_names, part.confusion
    caption = f"Confusion matrix of {group.label}"
    if len(names) <= LARGEST_MATRIX:
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        rows = tuple(
            Row(
                (
                    text(name),
                    *(
                        count(int(matrix[label, other]), heat=float(share[label, other]))
                        for other in range(len(names))
                    ),
                )
            )
            for label, name in enumerate(names)
        )
        return Table(caption, ("label", *names), rows, folded=True, group=group.index)
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    pairs = [divmod(int(place), len(names)) for place in order]
    rows = tuple(
        Row((text(names[label]), text(names[other]), count(int(wrong[label, other]))))
        for label, other in pairs
        if wrong[label, other]
    )
    caption = f"Most frequent confusions of {group.label}"
    return Table(caption, ("label", "predicted", "samples"), rows, folded=True, group=group.index)


def calibration_section(groups: Sequence[RunGroup], found: Mapping[int, Predictions]) -> Section:
    """Return the accuracy of every group by confidence, with its calibration error."""
    shown = [group for group in groups if group.index in found]
    series = tuple(_reliability(group, found[group.index]) for group in shown)
    if not series:
        return Section("calibration", "Calibration", ())
    rows = tuple(
        Row((text(group.label), number(calibration_error(found[group.index]), 4)), group.index)
        for group in shown
    )
    blocks = (
        Text(
            "Accuracy of the samples of each of 15 bins of confidence, the largest probability. On the "
            "diagonal, confidence and accuracy are the same; below it, the student is overconfident."
        ),
        Plot("Accuracy by confidence", "confidence", "accuracy", series, diagonal=True),
        Table("Expected calibration error over all seeds", ("recipe", "calibration error"), rows),
    )
    return Section("calibration", "Calibration", blocks)


def _reliability(group: RunGroup, part: Predictions) -> Series:
    samples, confidence, correct = part.bins.T
    used = samples > 0
    return Series(
        group.label,
        tuple((confidence[used] / samples[used]).tolist()),
        tuple((correct[used] / samples[used]).tolist()),
        style=group.index,
        group=group.index,
    )


def calibration_error(part: Predictions) -> float:
    """Return the mean over samples of |confidence - accuracy| of their bins."""
    samples, confidence, correct = part.bins.T
    return float(np.abs(confidence - correct).sum() / max(samples.sum(), 1))
