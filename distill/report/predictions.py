"""Predictions of a finished run on its evaluation data, which its metrics do not hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from coursepack.console import progress
from coursepack.data import open_source
from coursepack.data.loading import Renderer
from coursepack.distill.training.evaluate import evaluation_view, predict
from coursepack.errors import CoursepackError
from coursepack.imports import check_trusted
from coursepack.models import load_teacher
from coursepack.models.calibration import BINS, Calibration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from coursepack.data import Source
    from coursepack.distill.report.reading import RunGroup, RunLog
    from coursepack.distill.runs.folder import FinishedRun
    from coursepack.pages.problems import Problems

TOLERANCE = 0.002
"""Largest difference in accuracy that another device may explain."""


@dataclass(frozen=True)
class Predictions:
    """Counts of a classifier's predictions on the evaluation data, over one or more runs."""

    class_names: tuple[str, ...]
    confusion: NDArray[np.int64]
    """Number of samples `(C, C)` by label and predicted class."""
    bins: NDArray[np.float64]
    """Number of samples, sum of confidences and number of correct ones `(BINS, 3)` by confidence."""

    @property
    def accuracy(self) -> float:
        """Share of samples that were classified correctly."""
        return float(np.trace(self.confusion) / max(self.confusion.sum(), 1))

    @property
    def class_accuracy(self) -> NDArray[np.float64]:
        """Accuracy `(C,)` by label; NaN for a class without samples."""
        with np.errstate(invalid="ignore"):
            accuracy: NDArray[np.float64] = np.diag(self.confusion) / self.confusion.sum(1)
        return accuracy


def joined(parts: Iterable[Predictions]) -> Predictions | None:
    """Return the counts of several runs together, or None for no run."""
    found = list(parts)
    if not found:
        return None
    confusion = np.sum([part.confusion for part in found], axis=0)
    return Predictions(found[0].class_names, confusion, np.sum([part.bins for part in found], axis=0))


def predict_groups(
    groups: Iterable[RunGroup], device: torch.device, problems: Problems, *, trust_code: bool
) -> dict[int, Predictions]:
    """Return the predictions of every group of finished students, by index of the group.

    Groups of ensembles and of unfinished runs have none. A run that cannot be evaluated is a problem of the
    report.
    """
    sources: dict[tuple[str, str | None], Source] = {}
    found = {}
    for group in groups:
        logs = [log for log in group.runs if log.is_finished and not log.run.ensemble]
        each = []
        for log in logs:
            try:
                each.append(_predict(log.run, device, sources, trust_code=trust_code))
            except (CoursepackError, OSError) as error:
                problems.add(f"run {str(log.run.path)!r} was not evaluated: {error}")
                continue
            _check_accuracy(log, each[-1], problems)
        if each and len({part.class_names for part in each}) == 1 and len(each) == len(logs):
            found[group.index] = joined(each)
    return {index: part for index, part in found.items() if part is not None}


def _predict(
    run: FinishedRun, device: torch.device, sources: dict[tuple[str, str | None], Source], *, trust_code: bool
) -> Predictions:
    recipe = run.recipe
    name = check_trusted(recipe.evaluation, f"run {str(run.path)!r}", trust_code=trust_code)
    if (name, recipe.root) not in sources:
        sources[name, recipe.root] = open_source(name, Path(recipe.root) if recipe.root else None)
    source = sources[name, recipe.root]
    network = load_teacher(f"run:{run.path}", source.class_names, trust_code=trust_code)
    network.module.to(device)
    classes = len(source.class_names)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    calibration = Calibration(device)
    view, size = evaluation_view(source), network.preprocessing.size
    with (
        progress(f"evaluate {run.path.name}", len(source.labels), "samples") as meter,
        Renderer(source, view, [size], pin=device.type == "cuda") as renderer,
    ):
        for logits, labels in predict(network, source, device, renderer=renderer, meter=meter):
            confusion += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
            calibration.add(logits, labels)
    counts = confusion.cpu().numpy().reshape(classes, classes)
    bins = calibration.sums.cpu().numpy().reshape(BINS, 3)
    return Predictions(tuple(source.class_names), counts, bins)


def _check_accuracy(log: RunLog, predictions: Predictions, problems: Problems) -> None:
    recorded = float(log.run.metrics[-1]["evaluation"]["accuracy"])
    if abs(recorded - predictions.accuracy) > TOLERANCE:
        problems.add(
            f"run {str(log.run.path)!r} recorded an accuracy of {recorded:.2%} on "
            f"{log.run.recipe.evaluation}, but its weights now have "
            f"{predictions.accuracy:.2%}: weights or data have changed since"
        )
