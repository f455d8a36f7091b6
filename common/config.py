"""Configs: frozen pydantic models that refuse unknown keys, and errors that show everything wrong at once."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from coursepack.canonical import cut
from coursepack.errors import RecipeError
from coursepack.parsing import MOST_YAML_BYTES, parse_yaml, read_bounded

if TYPE_CHECKING:
    from pathlib import Path


MOST_LINES = 20
"""Problems of a file that are shown."""


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
        RecipeError: the file is missing, or is not what `parse_yaml` takes.
    """
    try:
        return parse_yaml(read_bounded(path, MOST_YAML_BYTES))
    except ValueError as error:
        raise RecipeError(f"{str(path)!r} {error}") from error
    except OSError as error:
        raise RecipeError(f"cannot read {str(path)!r}: {error.strerror}") from error


def write_yaml(values: Any) -> str:
    """Plain values as YAML, keys in the order given."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _refusal(model: type[Config], problems: list[Any], where: str) -> RecipeError:
    lines = [_line(model, problem) for problem in problems[:MOST_LINES]]
    if len(problems) > MOST_LINES:
        lines.append(f"  and {len(problems) - MOST_LINES:,} more")
    return RecipeError(f"{where} is not valid:\n" + "\n".join(lines))


_EXPECTED = {
    "tuple_type": "Input should be a list",
    "model_type": "Input should be a mapping",
    "model_attributes_type": "Input should be a mapping",
}
"""Where pydantic speaks of Python's types, what YAML calls them."""


def _line(model: type[Config], problem: Any) -> str:
    path = ".".join(cut(str(part)) for part in problem["loc"]) or "it"
    if problem["type"] == "extra_forbidden":
        known = [name for inner in _models_at(model, problem["loc"][:-1]) for name in inner.model_fields]
        return f"  {path}: unknown key{_near(str(problem['loc'][-1]), known)}"
    if problem["type"] == "union_tag_invalid":
        key, tag, tags = (str(problem["ctx"][part]) for part in ("discriminator", "tag", "expected_tags"))
        near = _near(tag, tags.replace("'", "").split(", "))
        return f"  {path}: unknown {key.strip(chr(39))} {cut(repr(tag))}{near or ', expected one of ' + tags}"
    if problem["type"] == "union_tag_not_found":
        return f"  {path}: {problem['ctx']['discriminator']} is missing, got {cut(repr(problem['input']))}"
    whole = problem["type"] == "value_error" and isinstance(problem["input"], dict)
    given = "" if problem["type"] == "missing" or whole else f", got {cut(repr(problem['input']))}"
    text = _EXPECTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return f"  {path}: {text}{given}"


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _models_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The configs that may stand at a place, as pydantic spells it: keys, list places, tags of a union."""
    found: list[type[BaseModel]] = [model]
    for part in path:
        if isinstance(part, int):
            continue
        held = [each.model_fields[part].annotation for each in found if part in each.model_fields]
        if held:
            found = [inner for annotation in held for inner in _models(annotation)]
        else:
            found = [each for each in found if any(part == f.default for f in each.model_fields.values())]
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configs in an annotation such as a tuple of a union of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in _models(part)]
