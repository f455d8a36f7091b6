"""Writes `catalog.json`: the names and the recipe options that help and completion show.

Run `python -m coursepack.distill.cli.catalog` after a change of a recipe's fields or of a table of names.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from coursepack import catalog
from coursepack.config import field_at
from coursepack.data import ENCODINGS, PRESETS, SOURCES
from coursepack.distill.cli.options import FIELDS
from coursepack.distill.methods import METHODS
from coursepack.distill.methods.description import NEEDS
from coursepack.distill.recipe import TrainRecipe
from coursepack.models.build import NETWORKS
from coursepack.models.precision import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULTS = {
    "method": "kd with stores, else supervised",
    "source": "the stores'",
    "view": "the stores'",
    "root": "the stores'",
}
"""Help text for defaults that are not constants."""
BOUNDS = {"ge": "min", "gt": "min", "le": "max", "lt": "max"}


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
        },
        "options": {name: _option(name, path) for name, path in FIELDS.items()},
    }


def _option(name: str, path: str) -> dict[str, Any]:
    """Return kind, bounds or choices, and help of the option of a recipe field."""
    field = field_at(TrainRecipe, path)
    text = " ".join((field.description or "").split())
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


def text_of(content: dict[str, dict[str, Any]]) -> str:
    """Return the catalog as the text of its file."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(catalog.__file__).resolve().with_name(catalog.FILE).write_text(text_of(make_catalog()), "utf-8")
