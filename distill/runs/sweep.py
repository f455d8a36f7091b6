"""A sweep: many students of one grid over shared stores, resumable, with one table at the end.

Students that see the same batches may be trained together: their views are rendered and their targets read
once for all of them. Each comes out as if it had been trained alone, to the last bit on a CPU.
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
from typing import TYPE_CHECKING, Any

from pydantic import Field

from coursepack.canonical import canonical_json
from coursepack.config import Config, parse_config
from coursepack.console import say
from coursepack.distill.recipe import load_recipe, set_value
from coursepack.distill.runs.folder import as_begun, check_free, finished_metrics
from coursepack.distill.runs.train import CHECKPOINT_SECONDS, begin, train_together
from coursepack.distill.setup.checks import check_recipe
from coursepack.distill.setup.prepare import opening, prepare
from coursepack.distill.setup.resolve import complete
from coursepack.distill.training.runtime import algorithms, generators_of, threads_of
from coursepack.errors import RecipeError, TrainingDiverged
from coursepack.models import build_network
from coursepack.models.build import WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from coursepack.distill.recipe import TrainRecipe

OWN_FIELDS = (
    *("student", "student_size", "student_mean", "student_std"),
    *("method", "objective", "optimizer", "patience"),
    *("precision", "channels_last", "compile"),
)
"""Fields in which students that are trained together may differ: none of them changes a batch."""
LONGEST_NAME = 100
MOST_STUDENTS = 10_000


class Grid(Config):
    """A grid file."""

    base: dict[str, Any] = Field(default={})
    """Recipe fields that all students share, as in the file of a recipe."""
    grid: dict[str, list[Any]]
    """Values to combine, each with each, by `field.subfield`."""


@dataclass(frozen=True)
class Student:
    """One student of a sweep."""

    name: str
    """What sets it apart; its folder's name."""
    recipe: TrainRecipe


def read_grid(path: Path, *, trust_code: bool = False) -> list[Student]:
    """The students of a grid file, in the order of its values, the last key's changing first.

    Raises:
        RecipeError: the file is not a grid, or one of its recipes is not valid.
        UntrustedCode: a store names Python code for what the grid leaves out, and `trust_code` is false.
    """
    grid = parse_config(Grid, load_recipe(path), str(path))
    empty = [key for key, values in grid.grid.items() if not values]
    if empty or not grid.grid:
        raise RecipeError(f"{str(path)!r} has no values for {', '.join(empty) or 'grid'}: give at least one")
    count = math.prod(map(len, grid.grid.values()))
    if count > MOST_STUDENTS:
        raise RecipeError(f"{str(path)!r} combines to {count:,} students, expected at most {MOST_STUDENTS:,}")
    students = []
    for chosen in itertools.product(*grid.grid.values()):
        settings = dict(zip(grid.grid, chosen, strict=True))
        values = copy.deepcopy(grid.base)
        for key, value in settings.items():
            set_value(values, key, copy.deepcopy(value), f"grid of {str(path)!r}")
        recipe = complete(values, str(path), trust_code=trust_code)
        students.append(Student(student_name(settings), recipe))
    names = [student.name for student in students]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RecipeError(f"{str(path)!r} gives {repeated[0]!r} more than once: name every value once")
    return students


def student_name(settings: Mapping[str, Any]) -> str:
    """A folder's name from what sets a student apart: `student=resnet20,seed=1`."""
    words = []
    short = [key.rpartition(".")[2] for key in settings]
    for key, value in settings.items():
        own = key.rpartition(".")[2]
        label = own if short.count(own) == 1 else key
        text = value if isinstance(value, str) else canonical_json(value)
        words.append(f"{label}={re.sub(r'[^A-Za-z0-9._+-]+', '-', text).strip('-')}")
    name = ",".join(words)
    if len(name) <= LONGEST_NAME and "/" not in "".join(map(str, settings.values())):
        return name
    digest = hashlib.sha256(canonical_json(dict(settings)).encode()).hexdigest()[:8]
    return f"{name[:LONGEST_NAME]}-{digest}"


def sweep(
    students: Sequence[Student],
    out: Path,
    *,
    device: torch.device,
    together: int = 1,
    resume: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    trust_code: bool = False,
) -> dict[str, str]:
    """Train the students of a sweep, each into its own folder in `out`.

    Args:
        students: as `read_grid` gives them.
        out: folder of the runs' folders.
        device: where to train.
        together: students that may be trained at a time, if they see the same batches.
        resume: leave out those that are finished, go on with those that are not.
        workers: processes that decode and render.
        threads: of torch and the kernels.
        checkpoint_seconds: time between checkpoints.
        trust_code: run live teachers even if their stores name Python code for them.

    Returns:
        What was wrong with students that diverged, by name; the others are finished.

    Raises:
        RunError: a folder is not free, or holds another run than the grid's.
        Otherwise as `train`, but for divergence.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a sweep runs in one process: leave torchrun out, or train its students one by one")
    pixels = ("student", "student_size", "student_mean", "student_std")
    for spec, size, mean, std in dict.fromkeys(
        tuple(getattr(student.recipe, name) for name in pixels) for student in students
    ):
        build_network(spec, 2, size=size, mean=mean, std=std)  # refuses, before the first is trained
    for student in students:
        check_recipe(student.recipe)
    if not resume:
        for student in students:
            check_free(out / student.name, overwrite=False)
    left = _unfinished(students, out) if resume else list(students)
    if len(left) < len(students):
        say(f"{len(students) - len(left)} of {len(students)} students are finished")
    waiting: list[list[Student]] = []
    for alike in _alike(left, out):
        waiting += [alike[start : start + together] for start in range(0, len(alike), together)]
    diverged: dict[str, str] = {}
    while waiting:
        group = waiting.pop(0)
        first = group[0].recipe
        try:
            with algorithms(deterministic=first.deterministic), threads_of(threads), generators_of(device):
                again = resume or any((out / student.name).exists() for student in group)
                found = _train_group(group, out, device, again, workers, checkpoint_seconds, trust_code)
        except TrainingDiverged as error:
            if len(group) > 1:
                # Within a step, whoever it was: the others go on from their checkpoints, each alone.
                waiting = [[student] for student in _unfinished(group, out)] + waiting
                continue
            found = {group[0].name: str(error)}
        for name, reason in found.items():
            say(f"{name}: {reason}")
        diverged |= found
    return diverged


def _train_group(
    group: Sequence[Student],
    out: Path,
    device: torch.device,
    resume: bool,
    workers: int | None,
    checkpoint_seconds: float,
    trust_code: bool,
) -> dict[str, str]:
    """Train a group; returns what was wrong with those that diverged."""
    first, *others = [as_begun(out / student.name, student.recipe) for student in group]
    setup = prepare(first, device, others=others, trust_code=trust_code)
    with ExitStack() as stack:
        trainings = [
            stack.enter_context(
                begin(setup, each.recipe, out / each.name, overwrite=False, resume=resume, tensorboard=False)
            )
            for each in group
        ]
        say(opening(setup))
        by_position: dict[tuple[int, int], list[Any]] = {}
        for training in trainings:
            position = (training.position.epoch, training.position.batches)
            by_position.setdefault(position, []).append(training)
        for alike in by_position.values():
            train_together(setup, alike, workers=workers, checkpoint_seconds=checkpoint_seconds)
    return {
        student.name: str(training.diverged)
        for student, training in zip(group, trainings, strict=True)
        if training.diverged is not None
    }


def _alike(students: Sequence[Student], out: Path) -> list[list[Student]]:
    """The students in groups that see the same batches, and read stores in the same way, in their order."""
    groups: dict[str, list[Student]] = {}
    for student in students:
        begun = as_begun(out / student.name, student.recipe)
        shared = begun.model_dump(mode="json", exclude=set(OWN_FIELDS))
        groups.setdefault(canonical_json(shared), []).append(student)
    return list(groups.values())


def _unfinished(students: Sequence[Student], out: Path) -> list[Student]:
    return [each for each in students if finished_metrics(out / each.name, each.recipe) is None]


def finished(students: Sequence[Student], out: Path) -> list[Path]:
    """Folders of the students that are finished."""
    return [out / student.name for student in students if (out / student.name / WEIGHTS_FILE).is_file()]
