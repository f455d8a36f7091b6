"""Reading of runs for a report, which keeps what can be read of unfinished and damaged ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coursepack.distill.runs.compare import compare, group_runs
from coursepack.distill.runs.folder import (
    PROVENANCE_FILE,
    FinishedRun,
    is_group,
    load_runs,
    read_recipe,
    student_folders,
)
from coursepack.distill.runs.records import MAX_METRICS_BYTES
from coursepack.errors import CoursepackError, RunError
from coursepack.models.build import WEIGHTS_FILE
from coursepack.models.record import METRICS_FILE, RECIPE_FILE
from coursepack.parsing import parse_json, read_bounded, read_json
from coursepack.problems import lines_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.compare import Group
    from coursepack.pages.problems import Problems

Number = Annotated[float, Field(gt=-1e12, lt=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    """Mapping read from a run folder; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class Evaluation(_Record):
    """Metrics on the evaluation data."""

    accuracy: Share
    nll: Number
    calibration_error: Number | None = None


class Teachers(_Record):
    """Metrics of the teachers over one epoch; lists have one entry per teacher."""

    weight: list[Number] = []
    weight_by_class: list[list[Number]] = []
    wrong: list[Number] = []
    shifted: list[Number] = []
    agreement: Number | None = None
    kl: Number | None = None


class Temperature(_Record):
    """Temperatures over one epoch."""

    mean: Number
    min: Number
    max: Number


class Epoch(_Record):
    """Line of a run's metrics."""

    epoch: Annotated[int, Field(ge=0, lt=1 << 48)]
    seconds: Annotated[float, Field(ge=0, lt=1e12)]
    train: dict[str, Number] = {}
    evaluation: Evaluation | None = None
    teachers: Teachers | None = None
    temperature: Temperature | None = None


class StoreRecord(_Record):
    """Store that a run read."""

    path: str
    fingerprint: str
    views: list[int] = []


class Provenance(_Record):
    """Provenance of a run."""

    stores: list[StoreRecord] = []
    source_fingerprint: str = ""
    view_fingerprint: str = ""
    versions: dict[str, str] = {}
    device: str = ""
    ranks: int = 1
    drift: list[str] = []


@dataclass(frozen=True)
class RunLog:
    """Run, finished or not, and what can be read of it."""

    run: FinishedRun
    """Path, recipe and readable metrics."""
    epochs: tuple[Epoch, ...]
    is_finished: bool
    """True if the run has final weights and an evaluation of them."""
    provenance: Provenance


@dataclass(frozen=True)
class RunGroup:
    """Runs of one recipe with different seeds, or one unfinished run."""

    index: int
    label: str
    runs: tuple[RunLog, ...]
    compared: Group | None
    """Row of the group in `distill compare`; None for an unfinished run."""

    @property
    def recipe(self) -> TrainRecipe:
        """Recipe of the first run."""
        return self.runs[0].run.recipe

    @property
    def teacher_names(self) -> list[str]:
        """Names of the stores, without folders and `.zarr`; their paths if two names are the same."""
        paths = self.recipe.stores
        names = [path.rstrip("/").rpartition("/")[2].removesuffix(".zarr") for path in paths]
        return names if len(set(names)) == len(names) else list(paths)


def read_groups(paths: Sequence[Path], problems: Problems) -> list[RunGroup]:
    """Read runs and group them as `distill compare` does; unfinished runs come last, each on its own.

    Args:
        paths: run folders, and those of groups of students.
        problems: gets an entry for all that cannot be read.

    Raises:
        RunError: no run can be read, or those that can may not be compared.
    """
    logs = [log for path in dict.fromkeys(paths) for log in _read(path, problems)]
    if not logs:
        raise RunError("there is no run to report:\n" + "\n".join(f"  {each}" for each in problems.texts))
    finished = {id(log.run): log for log in logs if log.is_finished}
    runs = [log.run for log in finished.values()]
    compared = list(zip(group_runs(runs), compare(runs), strict=True)) if runs else []
    groups = [
        RunGroup(index, group.label, tuple(finished[id(run)] for run in members), group)
        for index, (members, group) in enumerate(compared)
    ]
    for log in logs:
        if not log.is_finished:
            state = "damaged" if (log.run.path / WEIGHTS_FILE).is_file() else "unfinished"
            label = f"{log.run.path} ({state}, {len(log.epochs)} of {log.run.recipe.epochs} epochs)"
            groups.append(RunGroup(len(groups), label, (log,), None))
    return groups


def _read(path: Path, problems: Problems) -> list[RunLog]:
    try:
        runs = load_runs(path)
    except (CoursepackError, OSError) as error:
        return _salvage(path, error, problems)
    return [_log(run, problems, is_finished=True) for run in runs]


def _salvage(path: Path, error: Exception, problems: Problems) -> list[RunLog]:
    """Return what can be read of a run, or of every student of a group, that cannot be loaded."""
    try:
        if not (path / RECIPE_FILE).is_file():
            raise error
        recipe = read_recipe(path)
        if is_group(path):
            problems.add(f"{error} The students of the group are shown without their ensembles.")
            folders = student_folders(path, recipe)
            return [log for folder in folders for log in _read(folder, problems)]
    except (CoursepackError, OSError) as unreadable:
        problems.add(unreadable)
        return []
    problems.add(error)
    has_weights = (path / WEIGHTS_FILE).is_file()
    metrics, last_is_readable = _readable_metrics(path / METRICS_FILE, problems, is_finished=has_weights)
    log = _log(FinishedRun(path, recipe, metrics), problems, is_finished=False)
    is_finished = has_weights and last_is_readable and bool(metrics) and "evaluation" in metrics[-1]
    return [RunLog(log.run, log.epochs, is_finished, log.provenance)]


def _readable_metrics(
    path: Path, problems: Problems, *, is_finished: bool
) -> tuple[list[dict[str, Any]], bool]:
    """Return the readable lines of a metrics file, and whether the last one is among them."""
    try:
        lines = read_bounded(path, MAX_METRICS_BYTES).splitlines(keepends=True)
    except FileNotFoundError:
        return [], False
    except (ValueError, OSError) as error:
        problems.add(f"cannot read {str(path)!r}: {error}")
        return [], False
    if lines and not is_finished and not lines[-1].endswith(b"\n"):
        lines.pop()  # it is being written
    readable: list[dict[str, Any]] = []
    last_is_readable = False
    for number, line in enumerate(lines, start=1):
        last_is_readable = False
        try:
            values = parse_json(line)
        except ValueError as error:
            problems.add(f"line {number} of {str(path)!r} {error}. It is left out.")
            continue
        if (problem := _problem(values)) is not None:
            problems.add(f"line {number} of {str(path)!r} is damaged: {problem}. It is left out.")
            continue
        readable.append(values)
        last_is_readable = True
    return readable, last_is_readable


def _log(run: FinishedRun, problems: Problems, *, is_finished: bool) -> RunLog:
    good = []
    for line in run.metrics:
        if (problem := _problem(line)) is None:
            good.append(Epoch.model_validate(line))
        else:
            problems.add(
                f"epoch {line['epoch']} in {str(run.path / METRICS_FILE)!r} is damaged: {problem}. It is "
                "left out of the plots."
            )
    return RunLog(run, tuple(good), is_finished, _provenance(run.path, problems))


def _problem(values: Any) -> str | None:
    """Return what is wrong with a line of metrics, or None."""
    return _why(Epoch, values)


def _provenance(path: Path, problems: Problems) -> Provenance:
    file = path / PROVENANCE_FILE
    try:
        values = read_json(file, RunError)
    except RunError as error:
        problems.add(error)
        return Provenance()
    if (problem := _why(Provenance, values)) is not None:
        problems.add(f"{str(file)!r} is damaged: {problem}. The run's provenance is not shown.")
        return Provenance()
    return Provenance.model_validate(values)


def _why(model: type[BaseModel], values: Any) -> str | None:
    try:
        model.model_validate(values)
    except ValidationError as error:
        return lines_of(model, error)[0] if isinstance(values, dict) else "it is not a mapping"
    return None


def mean_by_epoch(runs: Iterable[dict[int, float]]) -> dict[int, tuple[float, float, float]]:
    """Return mean, lowest and highest value over runs by epoch, for epochs that all runs have."""
    curves = [curve for curve in runs if curve]
    common = set.intersection(*map(set, curves)) if curves else set()
    found = {}
    for epoch in sorted(common):
        values = [curve[epoch] for curve in curves]
        found[epoch] = (sum(values) / len(values), min(values), max(values))
    return found
