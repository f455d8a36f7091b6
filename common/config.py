"""Configs: frozen pydantic models that refuse unknown keys, and errors that show everything wrong at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping  # noqa: TC003 - dataclasses of pydantic's annotations are read at run time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import core_schema

from coursepack.canonical import cut
from coursepack.errors import RecipeError
from coursepack.parsing import MOST_YAML_BYTES, parse_yaml, read_bounded

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic.fields import FieldInfo


MOST_LINES = 20
"""Problems of a file that are shown."""


class Config(BaseModel):
    """Base of every config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class OneOf:
    """Annotation of a field that holds one config of a family, told apart by a key.

    `Annotated[Shape, OneOf("name", {"circle": Circle, "box": Box})]` reads `{"name": "circle"}` as a
    `Circle`.
    """

    key: str
    """Name of the field that tells the family's members apart."""
    members: Mapping[str, type[Config]]
    """The family by the value of the key."""

    def __get_pydantic_core_schema__(self, _source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Return pydantic's schema of the union."""
        choices = {name: handler.generate_schema(member) for name, member in self.members.items()}
        return core_schema.tagged_union_schema(choices, discriminator=self.key)


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
    """Refuse what is wrong in a config that is not complete yet; errors as `parse_config`.

    Whether fields fit together is not judged: what is left out may yet get another value than its default.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        problems = [
            problem
            for problem in error.errors()
            if not _is_about_whole(problem) and (problem["type"] != "missing" or len(problem["loc"]) > 1)
        ]
        if problems:
            raise _refusal(model, problems, where) from error


def field_at(model: type[BaseModel], path: str) -> FieldInfo:
    """Return a field of a config by its dotted path, through groups of fields and members of a family."""
    first, _, rest = path.partition(".")
    field = model.model_fields[first]
    if not rest:
        return field
    inner = next(each for each in _models_of(field) if rest.partition(".")[0] in each.model_fields)
    return field_at(inner, rest)


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
    whole = problem["type"] == "missing" or _is_about_whole(problem)
    given = "" if whole else f", got {cut(repr(problem['input']))}"
    text = _EXPECTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return f"  {path}: {text}{given}"


def _is_about_whole(problem: Any) -> bool:
    """Whether a problem is that of fields that do not fit together."""
    return problem["type"] == "value_error" and isinstance(problem["input"], dict)


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _models_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The configs that may stand at a place, as pydantic spells it: keys, list places, tags of a union."""
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
    """The configs that a field may hold."""
    families = [part for part in field.metadata if isinstance(part, OneOf)]
    return [*(inner for family in families for inner in family.members.values()), *_models(field.annotation)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configs in an annotation such as a tuple of a union of them."""
    if isinstance(annotation, OneOf):
        return list(annotation.members.values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = (*get_args(annotation), *getattr(annotation, "__metadata__", ()))
    return [inner for part in parts for inner in _models(part)]
