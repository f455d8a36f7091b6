"""Sweeps: one student per combination of values in a grid, resumable, with a table at the end.

Students that use the same batches can be trained together: views are rendered and targets are read once for
all of them. On a CPU, each student is identical, bit for bit, to one that is trained alone. Groups are
trained in this process, one after another, or by an executor that hands them to others.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from coursepack.canonical import canonical_json
from coursepack.config import Config, parse_config, start_paths
from coursepack.console import SHORT_SECONDS, inform, progress, warn
from coursepack.device import pick_device
from coursepack.distill.distributed import SINGLE_RANK
from coursepack.distill.recipe import load_recipe, set_value
from coursepack.distill.runs import CHECKPOINT_SECONDS
from coursepack.distill.runs.folder import check_free, finished_metrics, is_finished, recipe_to_resume
from coursepack.distill.runs.start import start_run
from coursepack.distill.runs.tracking import trackers_of
from coursepack.distill.runs.train import train_together
from coursepack.distill.setup.checks import check_recipe
from coursepack.distill.setup.describe import warnings_of
from coursepack.distill.setup.prepare import describe_setup, prepare
from coursepack.distill.setup.resolve import resolve_recipe
from coursepack.distill.training.runtime import preserved_generators, torch_algorithms, torch_threads
from coursepack.errors import RecipeError, TrainingDiverged
from coursepack.models import build_network

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from coursepack.distill.distributed import Ranks
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.start import Run

FREE_FIELDS = (
    *("student", "peers", "student_size", "student_mean", "student_std"),
    *("method", "objective", "optimizer", "patience", "keep_checkpoints"),
    *("precision", "channels_last", "compile"),
)
"""Fields in which students that are trained together may differ, since none of them affects batches."""
MAX_NAME_LENGTH = 100
MAX_STUDENTS = 10_000


class Grid(Config):
    """Content of a grid file."""

    base: dict[str, Any] = Field(default={})
    """Recipe fields that all students share, nested as in a recipe file."""
    grid: dict[str, list[Any]]
    """Values to combine, by `field.subfield`."""


@dataclass(frozen=True)
class Student:
    """One student of a sweep."""

    name: str
    """Name of the student's folder, made of the values that distinguish it."""
    recipe: TrainRecipe


def read_grid(path: Path, *, trust_code: bool = False) -> list[Student]:
    """Return the students of a grid file, with the values of the last key varying fastest.

    Raises:
        RecipeError: the file is not a grid, or one of its recipes is not valid.
        UntrustedCode: a store names Python code for a source or view that the grid leaves out, and
            `trust_code` is false.
    """
    grid = parse_config(Grid, load_recipe(path), str(path))
    empty = [key for key, values in grid.grid.items() if not values]
    if empty or not grid.grid:
        raise RecipeError(f"{str(path)!r} has no values for {', '.join(empty) or 'grid'}: give at least one")
    count = math.prod(map(len, grid.grid.values()))
    if count > MAX_STUDENTS:
        raise RecipeError(f"{str(path)!r} combines to {count:,} students, expected at most {MAX_STUDENTS:,}")
    students = []
    for chosen in itertools.product(*grid.grid.values()):
        settings = dict(zip(grid.grid, chosen, strict=True))
        values = copy.deepcopy(grid.base)
        for key, value in settings.items():
            set_value(values, key, copy.deepcopy(value), f"grid of {str(path)!r}")
        start_paths(values, path.parent)
        recipe = resolve_recipe(values, str(path), trust_code=trust_code)
        students.append(Student(student_name(settings), recipe))
    names = [student.name for student in students]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RecipeError(f"{str(path)!r} gives {repeated[0]!r} more than once: list every value once")
    return students


def student_name(settings: Mapping[str, Any]) -> str:
    """Return a student's folder name, for example `student=resnet20,seed=1`."""
    words = []
    short = [key.rpartition(".")[2] for key in settings]
    for key, value in settings.items():
        own = key.rpartition(".")[2]
        label = own if short.count(own) == 1 else key
        text = value if isinstance(value, str) else canonical_json(value)
        words.append(f"{label}={re.sub(r'[^A-Za-z0-9._+-]+', '-', text).strip('-')}")
    name = ",".join(words)
    if len(name) <= MAX_NAME_LENGTH and "/" not in "".join(map(str, settings.values())):
        return name
    digest = hashlib.sha256(canonical_json(dict(settings)).encode()).hexdigest()[:8]
    return f"{name[:MAX_NAME_LENGTH]}-{digest}"


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep that do not change its results."""

    device: str = "auto"
    """Name of the device, as `pick_device` takes it."""
    together: int = 1
    """Maximum number of students to train at the same time, if they use the same batches."""
    resume: bool = False
    workers: int | None = None
    threads: int | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    track: tuple[str, ...] = ()
    """Names of trackers."""
    trust_code: bool = False


class Executor(Protocol):
    """Trains groups of students, in whatever processes and order."""

    def train(
        self,
        groups: Sequence[Sequence[Student]],
        out: Path,
        how: SweepOptions,
        describe: Callable[[Sequence[Student]], str],
    ) -> dict[str, str]:
        """Train groups, each with `train_group`, and return the error messages of students that diverged.

        Args:
            groups: students that are trained together, each a result of `groups_of`.
            out: folder of the runs' folders.
            how: options.
            describe: function that returns the line to print before a group is trained.
        """


def sweep(
    students: Sequence[Student],
    out: Path,
    *,
    device: torch.device | str,
    together: int = 1,
    resume: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    tensorboard: bool = False,
    track: Sequence[str] = (),
    trust_code: bool = False,
    executor: Executor | None = None,
) -> dict[str, str]:
    """Train the students of a sweep, each into its own folder in `out`.

    Args:
        students: a result of `read_grid`.
        out: folder for the runs' folders.
        device: device to train on, or its name.
        together: maximum number of students to train at the same time, if they use the same batches.
        resume: skip finished runs, and continue unfinished ones.
        workers: number of processes that decode and render images.
        threads: number of threads of torch and the loss kernels.
        checkpoint_seconds: time between checkpoints.
        tensorboard: also write the metrics of every run for TensorBoard.
        track: names of trackers that show the metrics, as in `train`.
        trust_code: allow stores to name Python code for live teachers.
        executor: trains the groups in other processes. Defaults to one after another in this one.

    Returns:
        The error messages of the students that diverged, by name; all others are finished.

    Raises:
        RunError: a folder is not empty, or holds another run.
        Otherwise as `train`, except for divergence, and as the executor.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a sweep runs in one process: leave torchrun out, or train its students one by one")
    trackers = trackers_of(track, tensorboard=tensorboard)
    how = SweepOptions(
        str(device), together, resume, workers, threads, checkpoint_seconds, trackers, trust_code
    )
    pixels = ("student", "student_size", "student_mean", "student_std")
    for spec, size, mean, std in dict.fromkeys(
        tuple(getattr(student.recipe, name) for name in pixels) for student in students
    ):
        build_network(spec, 2, size=size, mean=mean, std=std)  # raises an error before any training
    for student in students:
        check_recipe(student.recipe)
    if not resume:
        for student in students:
            check_free(out / student.name, overwrite=False)
    remaining = unfinished(students, out) if resume else list(students)
    if len(remaining) < len(students):
        inform(f"{len(students) - len(remaining)} of {len(students)} students are finished")
    number = {student.name: index for index, student in enumerate(students, start=1)}

    def describe(group: Sequence[Student]) -> str:
        which = ", ".join(str(number[student.name]) for student in group)
        return f"student {which} of {len(students)}: {'; '.join(student.name for student in group)}"

    train = partial(_train_here, total=len(students)) if executor is None else executor.train
    try:
        return train(groups_of(remaining, out, together), out, how, describe)
    except KeyboardInterrupt:
        finished = len(finished_runs(students, out))
        warn(
            f"interrupted with {finished} of {len(students)} students finished: the same command with "
            f"--resume continues {out}"
        )
        raise


def _train_here(
    groups: Sequence[Sequence[Student]],
    out: Path,
    how: SweepOptions,
    describe: Callable[[Sequence[Student]], str],
    total: int,
) -> dict[str, str]:
    """Train groups of a sweep of `total` students one after another in this process."""
    device, waiting = pick_device(how.device), list(groups)
    diverged: dict[str, str] = {}
    done = total - sum(map(len, groups))
    with progress(f"sweep {out.name}", total, "students", done=done, delay=SHORT_SECONDS) as meter:
        while waiting:
            group = waiting.pop(0)
            inform(describe(group))
            failures, alone = train_group(group, out, device, how)
            waiting = [*alone, *waiting]
            for name, reason in failures.items():
                warn(f"{name}: {reason}")
            diverged |= failures
            meter.advance(len(group) - sum(map(len, alone)))
    return diverged


def train_group(
    group: Sequence[Student], out: Path, device: torch.device, how: SweepOptions, ranks: Ranks = SINGLE_RANK
) -> tuple[dict[str, str], list[list[Student]]]:
    """Train students together, or continue them.

    Args:
        group: students of a result of `groups_of`.
        out: folder of the runs' folders.
        device: device to train on.
        how: options.
        ranks: this process alone, with the number of processes that share the memory of its machine.

    Returns:
        The error messages of the students that diverged, by name, and groups that are to be trained yet.

    Raises:
        CoursepackError: as `train`, except for divergence.
    """
    first = group[0].recipe
    try:
        with (
            torch_algorithms(deterministic=first.deterministic),
            torch_threads(how.threads),
            preserved_generators(device),
        ):
            return _train_group(group, out, device, how, ranks), []
    except TrainingDiverged as error:
        if len(group) > 1:
            # It is unknown which student diverged in this step: continue each alone from its checkpoint.
            return {}, [[student] for student in unfinished(group, out)]
        return {group[0].name: str(error)}, []


def _train_group(
    group: Sequence[Student], out: Path, device: torch.device, how: SweepOptions, ranks: Ranks
) -> dict[str, str]:
    """Train students together, and return the error messages of those that diverged, by name."""
    resume = how.resume or any((out / student.name).exists() for student in group)
    first, *others = [recipe_to_resume(out / student.name, student.recipe) for student in group]
    setup = prepare(first, device, ranks, others=others, trust_code=how.trust_code)
    with ExitStack() as stack:
        student_runs: list[Run] = []
        for each in group:
            run = start_run(
                setup,
                each.recipe,
                out / each.name,
                overwrite=False,
                resume=resume,
                track=how.track,
            )
            student_runs.append(run)
            stack.enter_context(run)
        inform(describe_setup(setup))
        warnings = [warnings_of(each.recipe, setup.readers) for each in group]
        for warning in dict.fromkeys(itertools.chain(*warnings)):
            warn(warning)
        by_position: dict[tuple[int, int], list[Run]] = {}
        for run in student_runs:
            position = (run.position.epoch, run.position.batches)
            by_position.setdefault(position, []).append(run)
        for runs in by_position.values():
            train_together(setup, runs, workers=how.workers, checkpoint_seconds=how.checkpoint_seconds)
    return {
        student.name: str(run.diverged)
        for student, run in zip(group, student_runs, strict=True)
        if run.diverged is not None
    }


def groups_of(students: Sequence[Student], out: Path, together: int) -> list[list[Student]]:
    """Return the students in groups of at most `together` that use the same batches and read stores alike."""
    same: dict[str, list[Student]] = {}
    for student in students:
        resumed = recipe_to_resume(out / student.name, student.recipe)
        shared = resumed.model_dump(mode="json", exclude=set(FREE_FIELDS)) | {"shares": resumed.shares}
        same.setdefault(canonical_json(shared), []).append(student)
    return [
        group[start : start + together] for group in same.values() for start in range(0, len(group), together)
    ]


def unfinished(students: Sequence[Student], out: Path) -> list[Student]:
    """Return the students whose runs are not finished."""
    return [each for each in students if finished_metrics(out / each.name, each.recipe) is None]


def finished_runs(students: Sequence[Student], out: Path) -> list[Path]:
    """Return the folders of the finished students."""
    return [out / student.name for student in students if is_finished(out / student.name, student.recipe)]
