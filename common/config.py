"""Configs: frozen pydantic models that refuse unknown keys, and errors that show everything wrong at once."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path


class Config(BaseModel):
    """Base of every config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def parse_config(model: type[C], values: Any, where: str) -> C:
    """Build a config from plain values.

    Args:
        model: the config's class.
        values: what YAML or flags gave.
        where: the file or command they came from, for the error's text.

    Raises:
        RecipeError: all that is wrong, one line per field; an unknown key names the nearest valid one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(model, error.errors(), where) from error


def check_given(model: type[Config], values: Any, where: str) -> None:
    """Refuse what is wrong in a config that is not complete yet; errors as `parse_config`."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        problems = [p for p in error.errors() if p["type"] != "missing" or len(p["loc"]) > 1]
        if problems:
            raise _refusal(model, problems, where) from error


def read_yaml(path: Path) -> Any:
    """The plain values in a YAML file.

    Raises:
        RecipeError: the file is missing, is not text or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{str(path)!r} is not YAML: it is not text") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{str(path)!r} is not YAML: {error}") from error


def write_yaml(values: Any) -> str:
    """Plain values as YAML, keys in the order given."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _refusal(model: type[Config], problems: list[Any], where: str) -> RecipeError:
    return RecipeError(f"{where} is not valid:\n" + "\n".join(_line(model, problem) for problem in problems))


_EXPECTED = {
    "tuple_type": "Input should be a list",
    "model_type": "Input should be a mapping",
}
"""Where pydantic speaks of Python's types, what YAML calls them."""


def _line(model: type[Config], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _all_fields(model), n=1)
        return f"  {path}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")
    given = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    text = _EXPECTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return f"  {path}: {text}{given}"


def _all_fields(model: type[BaseModel]) -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _all_fields(field.annotation)
    return names
