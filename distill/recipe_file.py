"""Recipe files and assignments as plain values, not yet checked; importing this does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.config import read_yaml
from coursepack.errors import RecipeError
from coursepack.parsing import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def load_recipe(path: Path) -> dict[str, Any]:
    """Return the plain values of a recipe file.

    Raises:
        RecipeError: the file is missing, is not YAML, or is not a mapping.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        content = "nothing" if values is None else f"a {type(values).__name__}"
        raise RecipeError(f"{str(path)!r} holds {content}, expected a mapping of recipe fields")
    return values


def set_values(values: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply `key.subkey=value` assignments to a recipe's plain values in place; values are YAML.

    Raises:
        RecipeError: an assignment has no `=`, or its key passes through a value that is not a mapping.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"--set {assignment!r} is not key=value")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise RecipeError(f"--set {assignment!r}: the value {error}") from error
        set_value(values, key, value, f"--set {assignment!r}")


def set_value(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the value of a nested key, `key.subkey`, in place; `where` names the option in error messages.

    Raises:
        RecipeError: the key passes through a value that is not a mapping.
    """
    *parents, leaf = key.split(".")
    group = values
    for parent in parents:
        group = group.setdefault(parent, {})
        if not isinstance(group, dict):
            raise RecipeError(f"{where}: {parent!r} is {group!r}, not a group of fields")
    group[leaf] = value
