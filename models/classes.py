"""Class maps: correspondence between the classes of a source and those of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.config import read_yaml
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path


def load_columns(path: Path, class_names: tuple[str, ...]) -> tuple[int, ...]:
    """Read a class map: the teacher's class index for each class of a source, in the source's order.

    Args:
        path: YAML file with a list of the teacher's class indices in the order of the source's classes, or a
            mapping from the source's class names to the teacher's class indices.
        class_names: names of the source's classes.

    Raises:
        RecipeError: a class is missing, unknown or mapped twice, or a value is not a class index.
    """
    values = read_yaml(path)
    if isinstance(values, dict):
        values = {str(name): column for name, column in values.items()}
        missing = [name for name in class_names if name not in values]
        extra = [name for name in values if name not in class_names]
        if missing or extra:
            raise RecipeError(
                f"class map {str(path)!r} does not name the source's {len(class_names)} classes: "
                f"missing {missing[:3]}, unknown {extra[:3]} (first three of each)"
            )
        values = [values[name] for name in class_names]
    if not isinstance(values, list) or len(values) != len(class_names):
        got = f"{len(values)} entries" if isinstance(values, list) else f"a {type(values).__name__}"
        raise RecipeError(f"class map {str(path)!r} holds {got}, expected {len(class_names)} class ids")
    for name, column in zip(class_names, values, strict=True):
        if isinstance(column, bool) or not isinstance(column, int) or column < 0:
            raise RecipeError(
                f"class map {str(path)!r} gives {column!r:.80} for {name!r:.80}, expected a class id"
            )
    if len(set(values)) < len(values):
        raise RecipeError(f"class map {str(path)!r} gives one of the teacher's classes to two classes")
    return tuple(values)
