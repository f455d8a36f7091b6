"""Trackers, which show metrics of runs while they are trained, one module per tracker.

A new tracker is a module with the functions of `TrackerKind` and a row in `TRACKERS`. Its library is
imported when it is used.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from coursepack.canonical import canonical_json
from coursepack.console import warn
from coursepack.distill.runs.tracking import mlflow, tensorboard, wandb
from coursepack.distill.runs.tracking.base import TrackedRun as TrackedRun
from coursepack.distill.runs.tracking.base import Tracker as Tracker
from coursepack.distill.runs.tracking.base import TrackerKind
from coursepack.errors import RecipeError, UnknownName, first_line
from coursepack.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

TRACKERS = {
    "tensorboard": TrackerKind(tensorboard.check, tensorboard.start),
    "wandb": TrackerKind(wandb.check, wandb.start),
    "mlflow": TrackerKind(mlflow.check, mlflow.start),
}
"""Trackers by name. Each has an extra of its name in setup.cfg."""
TRACKING_FILE = "tracking.json"
"""File of a run's folder that has the state of its trackers."""
TRACKING_FOLDERS = (tensorboard.FOLDER, wandb.FOLDER)
"""Folders that trackers write in a run's folder."""


def trackers_of(names: Iterable[str], *, tensorboard: bool = False) -> tuple[str, ...]:
    """Return the names of trackers, each once, after checking that they and their libraries exist.

    Raises:
        UnknownName: there is no such tracker.
        RecipeError: a library is not installed.
    """
    chosen = tuple(dict.fromkeys((*names, *(["tensorboard"] if tensorboard else []))))
    for name in chosen:
        if name not in TRACKERS:
            raise UnknownName("tracker", name, TRACKERS)
        TRACKERS[name].check()
    return chosen


class Tracking:
    """Trackers of one run.

    A tracker that fails while the run is trained is left out from then on, with a warning: the run goes on.
    """

    def __init__(self, folder: Path, trackers: Mapping[str, Tracker]) -> None:
        """Initialize from trackers by name."""
        self._folder, self._trackers = folder, dict(trackers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """End the tracked runs, as failed if there is an error."""
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                tracker.end(error)
            except Exception as problem:  # the libraries' errors have no class in common
                self._warn(name, problem)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one epoch."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(metrics)
            except Exception as problem:
                del self._trackers[name]
                self._warn(name, problem)

    def _warn(self, name: str, problem: Exception) -> None:
        warn(
            f"warning: {name} does not track {self._folder} any longer: {first_line(problem)}. The run is "
            "not affected, and its metrics are in metrics.jsonl"
        )


def start_tracking(
    names: Sequence[str], folder: Path, name: str, recipe: Mapping[str, Any], *, first: int | None
) -> Tracking:
    """Start the trackers of a run, or continue what they tracked of it before.

    Args:
        names: names of trackers.
        folder: folder of the run.
        name: name of the run for people.
        recipe: the recipe as plain values.
        first: first epoch that will be logged, if the run is resumed; None for a new run.

    Raises:
        RecipeError: a tracker cannot be started.
    """
    if not names:
        return Tracking(folder, {})
    states = {} if first is None else _read_states(folder / TRACKING_FILE)
    started: dict[str, Tracker] = {}
    for each in names:
        run = TrackedRun(folder, name, recipe, first, states.get(each))
        try:
            tracker = TRACKERS[each].start(run)
        except Exception as error:
            Tracking(folder, started).end(error)
            again = f", or remove {folder / TRACKING_FILE} to track a new one" if run.state else ""
            raise RecipeError(
                f"{each} cannot track the run {str(folder)!r}: {first_line(error)}. No step was taken: "
                f"repair the connection or the settings of {each}{again}, or leave --track {each} out"
            ) from error
        started[each] = tracker
        if tracker.state:
            states[each] = dict(tracker.state)
    if states:
        # Written before the first step, so that a killed run is found again.
        write_whole(folder / TRACKING_FILE, canonical_json(states, indent=1).encode())
    return Tracking(folder, started)


def _read_states(path: Path) -> dict[str, dict[str, str]]:
    """Return the states of trackers by name; empty if the file is missing or damaged."""
    try:
        states = json.loads(path.read_bytes())
        return {
            name: {str(key): str(value) for key, value in state.items()} for name, state in states.items()
        }
    except (OSError, ValueError, AttributeError):
        return {}
