"""Checks of teachers that know only some of the source's classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.fusion import FUSIONS
from coursepack.distill.fusion.class_sets import linked_teachers
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store import StoreReader
    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.recipe import TrainRecipe

MAX_NAMES = 5
"""Maximum number of class names in an error."""


def check_classes(
    method: str, objective: ObjectiveConfig, readers: Sequence[StoreReader], read: Sequence[int]
) -> None:
    """Check that teachers know the classes that an objective reads of them.

    Args:
        method: name of the method, for error messages.
        objective: its objective.
        readers: the stores.
        read: indices of the stores whose logits are read.

    Raises:
        RecipeError: a teacher knows only some classes and the objective needs all of them, or the teachers
            together leave some open.
    """
    needs, partial = objective.needs(), [reader for reader in readers if not reader.manifest.knows_all]
    if partial and (head := needs.teacher_head or needs.teacher_heads):
        raise RecipeError(f"method {method!r} needs {head} with all classes, but {_known(partial[0])}")
    if not needs.fused or not FUSIONS[objective.fusion.name].unifies:
        for index in read:
            if readers[index] in partial:
                raise RecipeError(
                    f"method {method!r} compares all classes, but {_known(readers[index])}. Learn from such "
                    "teachers together with --method uhc-ce, or --set objective.fusion.name=unify"
                )
        return
    known = [reader.manifest.known_classes for reader in readers]
    if refusal := objective.fusion.refusal_of_classes(known, len(readers[0].manifest.class_names)):
        raise RecipeError(refusal)


def class_warnings(recipe: TrainRecipe, readers: Sequence[StoreReader]) -> list[str]:
    """Return a warning if teachers have no classes in common, and nothing says how much each counts."""
    objective = recipe.objective
    if not readers or not objective.needs().fused or not FUSIONS[objective.fusion.name].unifies:
        return []
    groups = linked_teachers([reader.manifest.known_classes for reader in readers])
    if len(groups) == 1:
        return []
    names = " and ".join(", ".join(readers[index].name for index in group) for group in groups)
    return [
        f"Warning: the teachers {names} have no class in common, so nothing says how probable the classes of "
        "one are beside those of the other: they count equally for every sample"
    ]


def _known(reader: StoreReader) -> str:
    manifest = reader.manifest
    names = [manifest.class_names[label] for label in manifest.known_classes]
    shown = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
    return (
        f"the teacher of store {reader.address!r} knows {len(names)} of the source's "
        f"{len(manifest.class_names)} ({shown})"
    )
