"""Writes `catalog.json`: the names and the recipe options that help and completion show.

Run `python -m coursepack.distill.cli.catalog` after a change of a recipe's fields or of a table of names.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from coursepack import catalog
from coursepack.config import description_at, field_at
from coursepack.data import ENCODINGS, PRESETS, SOURCES
from coursepack.distill.cli.options import FIELDS
from coursepack.distill.methods import METHODS
from coursepack.distill.methods.description import NEEDS
from coursepack.distill.recipe import TrainRecipe
from coursepack.models.build import NETWORKS
from coursepack.models.hubs import HUBS
from coursepack.models.precision import PRECISIONS
from coursepack.models.taps import KNOWN_REDUCTIONS, SKETCH
from coursepack.unions import OneOf, models_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coursepack.distill.objective_config import ObjectiveConfig

DEFAULTS = {
    "method": "kd with stores, else supervised",
    "source": "the stores'",
    "view": "the stores'",
    "root": "the stores'",
}
"""Help text for defaults that are not constants."""
BOUNDS = {"ge": "min", "gt": "min", "le": "max", "lt": "max"}
OTHER = [{"kind": "other"}]


def make_catalog() -> dict[str, dict[str, Any]]:
    """Return the content of `catalog.json`, from the recipe's fields and the tables of names."""
    return {
        "names": {
            "method": list(METHODS),
            "network": list(NETWORKS),
            "source": list(SOURCES),
            "view": list(PRESETS),
            "encoding": list(ENCODINGS),
            "precision": list(PRECISIONS),
            "need": list(NEEDS),
            "reduction": [*KNOWN_REDUCTIONS, SKETCH],
            "hub": [hub.form for hub in HUBS.values()],
        },
        "options": {name: _option(name, path) for name, path in FIELDS.items()},
        "methods": {name: _tags(method.objective) for name, method in METHODS.items()},
        "configs": make_configs(),
    }


def _option(name: str, path: str) -> dict[str, Any]:
    """Return kind, bounds or choices, and help of the option of a recipe field."""
    field = field_at(TrainRecipe, path)
    text = " ".join(description_at(TrainRecipe, path).split())
    default = DEFAULTS.get(name)
    if default is None and path.startswith("objective."):
        default = "the method's"
    elif default is None and not field.is_required():
        default = None if field.default in (None, False, ()) else str(field.default)
    shown = text + (f"  [default: {default}]" if default else "")
    return {**_kind(field.annotation, field.metadata), "help": shown}


def _kind(annotation: Any, bounds: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the kind of a field's values, with its choices or bounds."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        more = (bound for mark in marks for bound in getattr(mark, "metadata", [mark]))
        return _kind(inner, [*bounds, *more])
    if origin in (Union, types.UnionType):
        return _kind(get_args(annotation)[0], bounds)
    if origin is Literal:
        return {"kind": "choice", "choices": list(get_args(annotation))}
    if origin is tuple:
        return {"kind": "numbers"}
    if annotation in (int, float):
        return {"kind": "integer" if annotation is int else "number", "limits": _limits(bounds)}
    return {"kind": "flag" if annotation is bool else "text"}


def _limits(bounds: Sequence[Any]) -> dict[str, Any]:
    """Return click's arguments of a range of numbers within pydantic's bounds."""
    limits: dict[str, Any] = {}
    for bound in bounds:
        for name, side in BOUNDS.items():
            if hasattr(bound, name):
                limits |= {side: getattr(bound, name), f"{side}_open": name in ("gt", "lt")}
    return limits


def make_configs() -> dict[str, dict[str, Any]]:
    """Return the fields of a recipe's config and of all configs inside of it, by key."""
    configs: dict[str, dict[str, Any]] = {}
    waiting: list[type[BaseModel]] = [TrainRecipe]
    while waiting:
        model = waiting.pop(0)
        if _key(model) not in configs:
            configs[_key(model)] = {
                name: {
                    "required": field.is_required(),
                    "kinds": _kinds_of_field(model, name),
                }
                for name, field in model.model_fields.items()
            }
            waiting += [inner for field in model.model_fields.values() for inner in models_of(field)]
    return configs


def _key(model: type[BaseModel]) -> str:
    return f"{model.__module__.removeprefix('coursepack.').removeprefix('distill.')}.{model.__name__}"


def _kinds_of_field(model: type[BaseModel], name: str) -> list[dict[str, Any]]:
    """Return the kinds of values of a field; those that a method of the config checks are of kind `other`."""
    field, decorators = model.model_fields[name], model.__pydantic_decorators__.field_validators.values()
    if any(name in each.info.fields for each in decorators if each.info.mode == "after"):
        return [{"kind": "null"}, *OTHER] if field.default is None else OTHER
    return _kinds(field.annotation, field.metadata)


def _kinds(annotation: Any, marks: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """Return the kinds of values that a field takes; values of the kind `other` need the full check."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    family = next((mark for mark in marks if isinstance(mark, OneOf)), None)
    if family is not None:
        return [_family(family.key, family.members)]
    if origin is Annotated:
        return _annotated(arguments[0], [*marks, *arguments[1:]])
    if origin in (Union, types.UnionType):
        return [kind for inner in arguments for kind in _kinds(inner, marks)]
    if annotation is types.NoneType:
        return [{"kind": "null"}]
    if annotation in (int, float):
        bounds = [name for mark in marks for name in BOUNDS if hasattr(mark, name)]
        return [_kind(annotation, marks)] if len(bounds) == len(marks) else OTHER
    if marks:
        return OTHER
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [{"kind": "config", "config": _key(annotation)}]
    if origin is dict:
        pattern = _pattern(arguments[0])
        return [{"kind": "mapping", "of": _kinds(arguments[1]), **({"keys": pattern} if pattern else {})}]
    if origin is tuple:
        inner = [each for each in arguments if each is not ...]
        length = {} if ... in arguments else {"length": len(inner)}
        same = all(each == inner[0] for each in inner)
        return [{"kind": "list", "of": _kinds(inner[0]), **length}] if same else OTHER
    if origin is Literal:
        return [_kind(annotation)]
    simple = {bool: "flag", str: "text", Any: "any"}
    return [{"kind": simple[annotation]}] if origin is None and annotation in simple else OTHER


def _pattern(annotation: Any) -> str | None:
    """Return the pattern that text of a type has to match."""
    marks = [inner for mark in get_args(annotation)[1:] for inner in getattr(mark, "metadata", [mark])]
    return next((mark.pattern for mark in marks if getattr(mark, "pattern", None)), None)


def _annotated(inner: Any, marks: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the kinds of an annotated type, whose marks may be those of pydantic's `Field`."""
    key = next((mark.discriminator for mark in marks if getattr(mark, "discriminator", None)), None)
    if key is not None:
        members = {each.model_fields[key].default: each for each in get_args(inner)}
        return [_family(key, members)]
    return _kinds(inner, [bound for mark in marks for bound in getattr(mark, "metadata", [mark])])


def _family(key: str, members: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Return the kind of a family of configs, with the configs from whose fields a name is suggested."""
    known = {
        tag: [
            _key(each)
            for each in members.values()
            if any(tag == field.default for field in each.model_fields.values())
        ]
        for tag in members
    }
    return {
        "kind": "family",
        "key": key,
        "members": {tag: _key(each) for tag, each in members.items()},
        "known": {tag: keys for tag, keys in known.items() if keys},
    }


def _tags(objective: ObjectiveConfig) -> dict[str, Any]:
    """Return the members of families in a method's objective."""
    return {
        "fusion": objective.fusion.name,
        "exchange": objective.exchange.name,
        "terms": {name: term.term for name, term in objective.terms.items()},
    }


def text_of(content: dict[str, dict[str, Any]]) -> str:
    """Return the catalog as the text of its file, with a line for each method and each config."""
    long = {kind: content[kind] for kind in ("methods", "configs")}
    parts = [
        json.dumps({kind: content[kind]}, indent=1, ensure_ascii=False)[2:-2]
        for kind in content
        if kind not in long
    ]
    for kind, rows in long.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in rows.items()]
        parts.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    Path(catalog.__file__).resolve().with_name(catalog.FILE).write_text(text_of(make_catalog()), "utf-8")
