"""From names and numbers to objects: the student, what is read of the stores, the objective between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.distill.fusion import FUSIONS, FusionSetting
from coursepack.distill.methods import METHODS
from coursepack.distill.needs import check_needs, hint_pairs, hints_between, needed_arrays
from coursepack.distill.objective import Objective, Setting
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.student import look_inside
from coursepack.models import build_network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coursepack.data import Source
    from coursepack.data.store import StoreReader
    from coursepack.distill.course import Course
    from coursepack.distill.hints import Hint
    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.models import Network


def build_student(recipe: TrainRecipe, source: Source) -> Network:
    """The recipe's student with fresh weights.

    Raises:
        UnknownName: no such network.
        RecipeError: it cannot be built, or not for such pixels.
    """
    return build_network(
        recipe.student,
        len(source.class_names),
        seed=recipe.seed,
        size=recipe.student_size,
        mean=recipe.student_mean,
        std=recipe.student_std,
    )


def build_arrays(recipe: TrainRecipe, source: Source, readers: Sequence[StoreReader]) -> list[list[str]]:
    """What the recipe's objective reads of each store.

    Raises:
        RecipeError: a store does not hold it; the text has the command that adds it.
    """
    objective = recipe.objective
    pairs = hint_pairs(objective, readers, build_student(recipe, source)) if objective.uses_hints else []
    logits = objective.uses_soft_targets or METHODS[recipe.method].term is not None
    return needed_arrays(recipe.method, readers, pairs, logits=logits, root=recipe.root)


def build_objective(
    recipe: TrainRecipe, source: Source, readers: Sequence[StoreReader], student: Network
) -> Objective:
    """The recipe's objective, fitted to its teachers and its student.

    Raises:
        UnknownName: a layer that the student does not have.
        RecipeError: features that cannot be hints, or nothing that represents a sample.
    """
    pairs = hint_pairs(recipe.objective, readers, student) if recipe.objective.uses_hints else []
    hints = hints_between(pairs, readers, student, source.channels)
    return _fitted(recipe.method, recipe.objective, readers, student, hints, source.channels, recipe.seed)


def make_objective(
    course: Course,
    student: Network,
    method: str,
    changes: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Objective:
    """A method's objective for one student, fitted to the teachers of a course.

    Args:
        course: the stores to learn from.
        student: the network to teach.
        method: a name in `METHODS`.
        changes: fields of its `ObjectiveConfig` to replace, as `{"temperature": 2.0}`.
        seed: of what the objective draws: initial adapters and latents, a random teacher.

    Raises:
        UnknownName: no such method, or a layer that the student does not have.
        RecipeError: a field that does not exist, numbers that do not fit the stores, or features that are not
            stored; the text then has the command that adds them.
    """
    classes = len(course.source.class_names)
    config = resolve_objective(method, changes or {}, f"method {method!r}", classes=classes)
    return fit_objective(course, student, method, config, seed=seed)


def fit_objective(
    course: Course, student: Network, method: str, config: ObjectiveConfig, *, seed: int
) -> Objective:
    """The same from a config that is spelled out.

    Raises:
        UnknownName: a layer that the student does not have.
        RecipeError: as `make_objective`.
    """
    check_needs(method, config, course.readers, course.view, course.root)
    pairs = hint_pairs(config, course.readers, student) if config.uses_hints else []
    needed_arrays(method, course.readers, pairs, logits=True, root=course.root)
    hints = hints_between(pairs, course.readers, student, course.source.channels)
    return _fitted(method, config, course.readers, student, hints, course.source.channels, seed)


def _fitted(
    method: str,
    config: ObjectiveConfig,
    readers: Sequence[StoreReader],
    student: Network,
    hints: tuple[Hint, ...],
    channels: int,
    seed: int,
) -> Objective:
    width = 0
    layer = config.fusion.layer
    if config.uses_soft_targets and FUSIONS[config.fusion.name].needs_representation:
        layers = [] if layer is None else [layer]
        width, _ = look_inside(student, channels, layers, representation=True, layer=layer)
    fusion = FusionSetting(
        teachers=max(1, len(readers)),
        weights=config.teacher_weights,
        width=width,
        accuracies=tuple(map(_accuracy, readers)),
        seed=seed,
        teacher=config.fusion.teacher,
        init=config.fusion.init,
    )
    return Objective(config, Setting(fusion, hints, METHODS[method].term, seed))


def _accuracy(reader: StoreReader) -> float:
    """Share of rows on which the store's teacher was right, over the views that are recorded."""
    sums = [record["sums"] for record in reader.manifest.view_records.values()]
    rows = sum(float(each.get("rows", 0)) for each in sums)
    return sum(float(each.get("correct", 0)) for each in sums) / max(rows, 1.0)
