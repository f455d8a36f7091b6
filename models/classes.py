"""Class maps: correspondence between the classes of a source and those of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.config import read_yaml, write_yaml
from coursepack.console import inform, printable
from coursepack.errors import RecipeError
from coursepack.files import write_whole
from coursepack.models.class_names import match_names, nearest_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MAX_LISTED = 100
"""Largest number of a teacher's classes that are all listed in a class map that is written."""
MISSING = "missing"
"""Value in a class map for a class of the source that the teacher does not know."""
LEAST_KNOWN = 2
"""Least number of classes that a teacher knows: the only class of one would always be certain."""


def load_columns(
    path: Path,
    class_names: tuple[str, ...],
    trained_on: Callable[[], tuple[str, ...] | None] | None = None,
) -> tuple[int | None, ...]:
    """Read a class map: the teacher's class index for each class of a source, in the source's order.

    A class that the teacher does not know is None; the file has `missing` for it.

    If there is no such file and the names of the teacher's classes are known, the file is written with the
    classes that are found by name (`match_names`).

    Args:
        path: YAML file with a list of the teacher's classes, by index or name, in the order of the source's
            classes, or a mapping from the source's class names to the teacher's classes.
        class_names: names of the source's classes.
        trained_on: returns the names of the teacher's classes, or None if they are unknown.

    Raises:
        RecipeError: a class is not mapped, unknown or mapped twice, a value is not a class, or fewer than two
            classes are known; or the file was written and is to be completed.
    """
    if trained_on is not None and not path.exists() and (names := trained_on()) is not None:
        return _write_map(path, class_names, names)
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
    if any(isinstance(value, str) and value != MISSING for value in values):
        names = None if trained_on is None else trained_on()
        values = [_index_of(value, names, path) for value in values]
    for name, column in zip(class_names, values, strict=True):
        if column != MISSING and (isinstance(column, bool) or not isinstance(column, int) or column < 0):
            raise RecipeError(
                f"class map {str(path)!r} gives {column!r:.80} for {name!r:.80}, expected a class id, or "
                f"{MISSING!r} if the teacher does not know the class"
            )
    known = [value for value in values if value != MISSING]
    if len(set(known)) < len(known):
        raise RecipeError(f"class map {str(path)!r} gives one of the teacher's classes to two classes")
    if len(known) < min(LEAST_KNOWN, len(values)):
        raise RecipeError(
            f"class map {str(path)!r} has {len(known)} classes that the teacher knows, expected at least "
            f"{LEAST_KNOWN}"
        )
    return tuple(None if value == MISSING else value for value in values)


def _index_of(value: object, names: tuple[str, ...] | None, path: Path) -> object:
    """Return the index of a class that a class map gives by name; anything else as it is."""
    if not isinstance(value, str) or value == MISSING:
        return value
    if names is None:
        raise RecipeError(
            f"class map {str(path)!r} gives the name {value!r:.80}, but the names of the teacher's classes "
            "are not known: give its index"
        )
    if names.count(value) != 1:
        near = ", ".join(map(repr, nearest_names(value, names))) or "none"
        raise RecipeError(
            f"class map {str(path)!r} gives the name {value!r:.80}, which {names.count(value)} of the "
            f"teacher's {len(names)} classes have. Nearest names: {near}. Give a name or an index"
        )
    return names.index(value)


def _write_map(path: Path, class_names: Sequence[str], trained_on: Sequence[str]) -> tuple[int, ...]:
    """Write a class map of the classes that are found by name, and return it if these are all.

    Raises:
        RecipeError: classes of the source are not found.
    """
    columns = match_names(class_names, trained_on)
    lines = ["# Class of the teacher for each class of the source: its index, or its name."]
    if len(trained_on) <= MAX_LISTED:
        known = ", ".join(f"{index} {name}" for index, name in enumerate(trained_on))
        lines.append(f"# Classes of the teacher: {_one_line(known)}")
    for name, column in zip(class_names, columns, strict=True):
        near = [f"{trained_on.index(other)} {other}" for other in nearest_names(name, trained_on)]
        note = trained_on[column] if column is not None else "nearest: " + ("; ".join(near) or "none")
        lines.append(f"{write_yaml({name: column}).strip()}  # {_one_line(note)}")
    write_whole(path, ("\n".join(lines) + "\n").encode())
    missing = [name for name, column in zip(class_names, columns, strict=True) if column is None]
    found = f"{len(class_names) - len(missing)} of the source's {len(class_names)} classes"
    if missing:
        raise RecipeError(
            f"there was no class map {str(path)!r}; it was written with {found} found by name among the "
            f"teacher's {len(trained_on)}. Replace null for the others ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}), by {MISSING!r} where the teacher has none, and run the "
            "command again"
        )
    inform(f"{path}: written with the teacher's classes for {found}, found by name")
    return tuple(column for column in columns if column is not None)


def _one_line(text: str) -> str:
    """Return a text for a comment: without control characters and line breaks."""
    return printable(text).replace("\n", " ")
