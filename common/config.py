"""Configs: frozen pydantic models that reject unknown keys and report all errors of a file together."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from coursepack.errors import RecipeError
from coursepack.parsing import MAX_YAML_BYTES, parse_yaml, read_bounded
from coursepack.problems import is_combined, lines_of_problems
from coursepack.unions import OneOf as OneOf
from coursepack.unions import models_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic.fields import FieldInfo


MAX_LINES = 20
"""Maximum number of errors of a file that are reported."""


class Config(BaseModel):
    """Base class of configs: immutable, with an error for unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def parse_config(model: type[C], values: Any, where: str) -> C:
    """Build a config from plain values.

    Args:
        model: class of the config.
        values: plain values from YAML or options.
        where: file or command that the values come from, for the error message.

    Raises:
        RecipeError: the values are not valid. The message has one line per wrong field and suggests the
            nearest valid name for an unknown key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise refusal(lines_of_problems(model, error.errors()), where) from error


def check_given(model: type[Config], values: Any, where: str) -> None:
    """Check the values of an incomplete config, whose missing fields will be given later.

    Checks that combine several fields are skipped, because a missing field may not keep its default.

    Raises:
        RecipeError: as in `parse_config`.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        problems = [
            problem
            for problem in error.errors()
            if not is_combined(problem) and (problem["type"] != "missing" or len(problem["loc"]) > 1)
        ]
        if problems:
            raise refusal(lines_of_problems(model, problems), where) from error


def field_at(model: type[BaseModel], path: str) -> FieldInfo:
    """Return the field of a config at a dotted path through nested configs and `OneOf` families."""
    owner, name = _owner(model, path)
    return owner.model_fields[name]


def description_at(model: type[BaseModel], path: str) -> str:
    """Return the docstring of the field of a config at a path, as in `field_at`.

    Docstrings are read from the source when they are needed, because reading all of them takes as long as
    importing the configs.
    """
    owner, name = _owner(model, path)
    for each in owner.__mro__:
        if each is not Config and issubclass(each, Config):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            assert isinstance(definition, ast.ClassDef)
            for field, text in itertools.pairwise(definition.body):
                if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == name:
                    return (
                        inspect.cleandoc(ast.literal_eval(text.value)) if isinstance(text, ast.Expr) else ""
                    )
    return ""


def _owner(model: type[BaseModel], path: str) -> tuple[type[BaseModel], str]:
    """Return the config that holds the field at a path, and the field's name."""
    first, _, rest = path.partition(".")
    if not rest:
        return model, first
    inner = models_of(model.model_fields[first])
    return _owner(next(each for each in inner if rest.partition(".")[0] in each.model_fields), rest)


def read_yaml(path: Path) -> Any:
    """Return the plain values in a YAML file.

    Raises:
        RecipeError: the file is missing, or `parse_yaml` rejects it.
    """
    try:
        return parse_yaml(read_bounded(path, MAX_YAML_BYTES))
    except ValueError as error:
        raise RecipeError(f"{str(path)!r} {error}") from error
    except OSError as error:
        raise RecipeError(f"cannot read {str(path)!r}: {error.strerror}") from error


PATHS: dict[str, Callable[[Path], bool]] = {
    "stores": Path.exists,
    "root": Path.is_dir,
    "view": Path.is_file,
    "weights": Path.is_file,
    "classes": Path.is_file,
}
"""Fields of files that may hold paths, and whether a path is one of the field's."""


def start_paths(values: Any, folder: Path) -> None:
    """Make relative paths in a file's values start from the file's folder, in place.

    A path at which there is nothing in that folder is left as it is, and starts from the current one.
    """
    for each in values if isinstance(values, list) else ():
        start_paths(each, folder)
    if isinstance(values, dict):
        for name, value in values.items():
            values[name] = _started(value, folder, PATHS[name]) if name in PATHS else value
            start_paths(values[name], folder)


def _started(value: Any, folder: Path, is_there: Callable[[Path], bool]) -> Any:
    if isinstance(value, list):
        return [_started(each, folder, is_there) for each in value]
    if not isinstance(value, str) or not value:
        return value
    try:
        return str(folder / value) if is_there(folder / value) else value
    except (OSError, ValueError):  # no name of a file
        return value


def write_yaml(values: Any) -> str:
    """Return plain values as YAML text, with keys in their order."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def refusal(lines: list[str], where: str) -> RecipeError:
    """Return the error of a file with a line for each of its errors."""
    lines = list(lines)
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"and {len(lines) - MAX_LINES:,} more"]
    return RecipeError(f"{where} is not valid:\n" + "\n".join(f"  {line}" for line in lines))


def merge_values(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge changes into nested plain values in place.

    A group of another kind, by its key `name` or `term`, replaces the group instead of being merged into it.
    """
    for name, change in changes.items():
        current = values.get(name)
        if isinstance(current, dict) and isinstance(change, dict) and _is_same_kind(current, change):
            merge_values(current, change)
        else:
            values[name] = change


def _is_same_kind(current: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    return all(change.get(key, current.get(key)) == current.get(key) for key in ("name", "term"))
