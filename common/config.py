"""Configs: frozen pydantic models that reject unknown keys and report all errors of a file together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from coursepack.canonical import cut
from coursepack.errors import RecipeError, nearest
from coursepack.parsing import MOST_YAML_BYTES, parse_yaml, read_bounded
from coursepack.unions import OneOf as OneOf
from coursepack.unions import merge_errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic.fields import FieldInfo


MOST_LINES = 20
"""Maximum number of errors of a file that are reported."""


class Config(BaseModel):
    """Base class of configs: immutable, with an error for unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


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
        raise _refusal(model, error.errors(), where) from error


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
            if not _is_combined(problem) and (problem["type"] != "missing" or len(problem["loc"]) > 1)
        ]
        if problems:
            raise _refusal(model, problems, where) from error


def field_at(model: type[BaseModel], path: str) -> FieldInfo:
    """Return the field of a config at a dotted path through nested configs and `OneOf` families."""
    first, _, rest = path.partition(".")
    field = model.model_fields[first]
    if not rest:
        return field
    inner = next(each for each in _models_of(field) if rest.partition(".")[0] in each.model_fields)
    return field_at(inner, rest)


def read_yaml(path: Path) -> Any:
    """Return the plain values in a YAML file.

    Raises:
        RecipeError: the file is missing, or `parse_yaml` rejects it.
    """
    try:
        return parse_yaml(read_bounded(path, MOST_YAML_BYTES))
    except ValueError as error:
        raise RecipeError(f"{str(path)!r} {error}") from error
    except OSError as error:
        raise RecipeError(f"cannot read {str(path)!r}: {error.strerror}") from error


def write_yaml(values: Any) -> str:
    """Return plain values as YAML text, with keys in their order."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _refusal(model: type[Config], problems: list[Any], where: str) -> RecipeError:
    problems = merge_errors(model, problems)
    lines = [_line(model, problem) for problem in problems[:MOST_LINES]]
    if len(problems) > MOST_LINES:
        lines.append(f"  and {len(problems) - MOST_LINES:,} more")
    return RecipeError(f"{where} is not valid:\n" + "\n".join(lines))


_EXPECTED = {
    "tuple_type": "Input should be a list",
    "model_type": "Input should be a mapping",
    "model_attributes_type": "Input should be a mapping",
}
"""Messages for errors of pydantic that would name Python types instead of YAML's."""


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
    no_value = problem["type"] == "missing" or _is_combined(problem)
    given = "" if no_value else f", got {cut(repr(problem['input']))}"
    text = _EXPECTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return f"  {path}: {text}{given}"


def _is_combined(problem: Any) -> bool:
    """Return True if an error concerns a combination of fields instead of one field."""
    return problem["type"] == "value_error" and isinstance(problem["input"], dict)


def _near(word: str, known: list[str]) -> str:
    near = nearest(word, known)
    return f", did you mean {near!r}?" if near else ""


def _models_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """Return the configs that may be at a path of pydantic's: keys, list indices and tags of a union."""
    found: list[type[BaseModel]] = [model]
    for part in path:
        if isinstance(part, int):
            continue
        held = [each.model_fields[part] for each in found if part in each.model_fields]
        if held:
            found = [inner for field in held for inner in _models_of(field)]
        else:
            found = [
                each for each in found if any(part == f.default for f in each.model_fields.values())
            ] or found
    return found


def _models_of(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the configs that a field may hold."""
    families = [part for part in field.metadata if isinstance(part, OneOf)]
    return [*(inner for family in families for inner in family.members.values()), *_models(field.annotation)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the configs in an annotation, such as a tuple of a union of configs."""
    if isinstance(annotation, OneOf):
        return list(annotation.members.values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = (*get_args(annotation), *getattr(annotation, "__metadata__", ()))
    return [inner for part in parts for inner in _models(part)]


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
