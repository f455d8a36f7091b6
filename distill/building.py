"""From a recipe to objects: the student, what is read of the stores, and the objective between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.fusion import FUSIONS, FusionSetting
from coursepack.distill.methods import METHODS
from coursepack.distill.needs import hint_pairs, hints_between, needed_arrays
from coursepack.distill.objective import Objective, Setting
from coursepack.distill.student import look_inside
from coursepack.models import build_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data import Source
    from coursepack.data.store import StoreReader
    from coursepack.distill.hints import Hint
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.models import Network


def build_student(recipe: TrainRecipe, source: Source) -> Network:
    """The recipe's student with fresh weights."""
    classes = len(source.class_names)
    return build_network(recipe.student, classes, seed=recipe.seed, size=recipe.student_size)


def build_arrays(recipe: TrainRecipe, source: Source, readers: Sequence[StoreReader]) -> list[list[str]]:
    """What the recipe's objective reads of each store.

    Raises:
        RecipeError: a store does not hold it; the text has the command that adds it.
    """
    objective = recipe.objective
    pairs = hint_pairs(objective, readers, build_student(recipe, source)) if objective.uses_hints else []
    logits = objective.uses_soft_targets or METHODS[recipe.method].term is not None
    return needed_arrays(recipe, readers, pairs, logits=logits)


def build_objective(
    recipe: TrainRecipe, source: Source, readers: Sequence[StoreReader], student: Network
) -> Objective:
    """The recipe's objective, fitted to its teachers and its student.

    Raises:
        UnknownName: a layer that the student does not have.
        RecipeError: features that cannot be hints, or nothing that represents a sample.
    """
    config = recipe.objective
    width = 0
    layer = config.fusion.layer
    if config.uses_soft_targets and FUSIONS[config.fusion.name].needs_representation:
        layers = [] if layer is None else [layer]
        width, _ = look_inside(student, source.channels, layers, representation=True, layer=layer)
    hints: tuple[Hint, ...] = ()
    if config.uses_hints:
        pairs = hint_pairs(config, readers, student)
        hints = hints_between(pairs, readers, student, source.channels)
    fusion = FusionSetting(
        teachers=max(1, len(readers)),
        weights=config.teacher_weights,
        width=width,
        accuracies=tuple(map(_accuracy, readers)),
        seed=recipe.seed,
        teacher=config.fusion.teacher,
        init=config.fusion.init,
    )
    return Objective(config, Setting(fusion, hints, METHODS[recipe.method].term, recipe.seed))


def _accuracy(reader: StoreReader) -> float:
    """Share of rows on which the store's teacher was right, over the views that are recorded."""
    sums = [record["sums"] for record in reader.manifest.view_records.values()]
    rows = sum(float(each.get("rows", 0)) for each in sums)
    return sum(float(each.get("correct", 0)) for each in sums) / max(rows, 1.0)
