"""Fields that hold one of several types: families of configs, and errors without pydantic's names of types.

For a union of types pydantic reports an error for each of them, and puts a label of the type into its path:
`weight.constrained-float`. Users get one error for the field, at a path of keys and list indices.
"""

from __future__ import annotations

import types
from collections.abc import Mapping  # noqa: TC003 - dataclasses of pydantic's annotations are read at run time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import core_schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo

    Path = tuple[str | int, ...]

NAMES = {float: "a number", int: "an integer", str: "text", bool: "true or false"}
KEY = "[key]"
"""Last part of the path of an error about a key of a mapping."""
OTHER_TYPE = ("_type", "_parsing", "literal_error")
"""Ends of pydantic's names of errors about a value of another type, rather than one out of range."""


@dataclass(frozen=True)
class OneOf:
    """Annotation of a field that holds one config of a family, selected by the value of a key.

    `Annotated[Shape, OneOf("name", {"circle": Circle, "box": Box})]` reads `{"name": "circle"}` as a
    `Circle`.
    """

    key: str
    """Name of the field whose value selects the member."""
    members: Mapping[str, type[BaseModel]]
    """Configs of the family by the value of the key."""

    def __get_pydantic_core_schema__(self, _source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Return pydantic's schema of the tagged union."""
        choices = {name: handler.generate_schema(member) for name, member in self.members.items()}
        return core_schema.tagged_union_schema(choices, discriminator=self.key)


def merge_errors(model: type[BaseModel], problems: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return pydantic's errors with those about the types of a union merged into one for its field."""
    groups: dict[Path, list[dict[str, Any]]] = {}
    unions: dict[Path, list[Any]] = {}
    for problem in problems:
        path: Path = problem["loc"]
        depth, choices = _first_union(model, path)
        if choices:
            path = path[:depth]
            unions[path] = choices
        groups.setdefault(path, []).append(dict(problem))
    merged = []
    for path, group in groups.items():
        merged += _merge(path, unions[path], group) if path in unions else group
    return merged


def _merge(path: Path, choices: Sequence[Any], group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the errors that explain best why a value is none of the types of a union."""
    depth = len(path)
    inside = [problem for problem in group if len(problem["loc"]) > depth + 1]
    if inside:  # a mapping or a list with something wrong in it
        return [{**problem, "loc": path + problem["loc"][depth + 1 :]} for problem in inside]
    for problem in group:
        if not problem["type"].endswith(OTHER_TYPE):
            return [{**problem, "loc": path}]
    expected = " or ".join(map(_name, choices))
    return [{"type": "union", "loc": path, "ctx": {"expected": expected}, "input": group[0]["input"]}]


def _first_union(model: type[BaseModel], path: Path) -> tuple[int, list[Any]]:
    """Return the length of the path to the first union on a path, and its types if there is one."""
    annotation: Any = model
    for depth, part in enumerate(path):
        choices = _choices(annotation)
        if len(choices) > 1:
            return depth, choices
        annotation = _below(choices[0], part) if choices else None
    return len(path), []


def _choices(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, without None; a tagged union of configs is one type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        family = next((mark for mark in annotation.__metadata__ if isinstance(mark, OneOf)), None)
        is_tagged = any(getattr(mark, "discriminator", None) for mark in annotation.__metadata__)
        return [family or annotation] if family or is_tagged else _choices(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [choice for each in get_args(annotation) for choice in _choices(each)]
    return [] if annotation in (None, types.NoneType) else [annotation]


def _below(kind: Any, part: str | int) -> Any:
    """Return the annotation of a part of a value, or None if it is not known."""
    if isinstance(kind, OneOf):
        return kind.members.get(str(part))
    if get_origin(kind) is Annotated:
        members = _choices(get_args(kind)[0])
        return next(
            (each for each in members if any(part == f.default for f in each.model_fields.values())), None
        )
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        if field is None:
            return None
        return next((mark for mark in field.metadata if isinstance(mark, OneOf)), field.annotation)
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return arguments[1]
    if get_origin(kind) in (tuple, list) and isinstance(part, int):
        return arguments[part] if part < len(arguments) and ... not in arguments else arguments[0]
    return None


def _name(kind: Any) -> str:
    """Return the name of a type for users of YAML."""
    if get_origin(kind) is Literal:
        *others, last = map(repr, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with {', '.join(kind.model_fields)}"
    if isinstance(kind, OneOf):
        return f"a mapping with {kind.key}"
    return NAMES.get(kind, "a list" if get_origin(kind) in (tuple, list) else "a mapping")


def without_tags(model: type[BaseModel], path: Path) -> Path:
    """Return a path of `merge_errors` without the tags of families and pydantic's mark of keys."""
    shown: list[str | int] = []
    annotation: Any = model
    for part in path:
        if part == KEY:
            continue
        choices = _choices(annotation)
        below = [(each, inner) for each in choices if (inner := _below(each, part)) is not None]
        chosen, annotation = below[0] if below else (None, None)
        if not isinstance(chosen, OneOf) and get_origin(chosen) is not Annotated:
            shown.append(part)
    return tuple(shown)


def keys_at(model: type[BaseModel], path: Path) -> list[str]:
    """Return the keys that a config may have at a path of pydantic's: keys, list indices and tags."""
    found: list[type[BaseModel]] = [model]
    for part in path:
        if isinstance(part, int):
            continue
        held = [each.model_fields[part] for each in found if part in each.model_fields]
        if held:
            found = [inner for field in held for inner in models_of(field)]
        else:
            found = [
                each for each in found if any(part == f.default for f in each.model_fields.values())
            ] or found
    return [name for each in found for name in each.model_fields]


def models_of(field: FieldInfo) -> list[type[BaseModel]]:
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
