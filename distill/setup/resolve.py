"""Resolution of recipes: fields that are not given are filled in from the stores and the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coursepack.config import check_given, parse_config
from coursepack.data import open_source, view_recipe
from coursepack.data.sources import evaluation_spec, open_stored
from coursepack.data.sources.fake import stand_in
from coursepack.data.views import PRESETS, stored_view
from coursepack.distill.methods import METHODS
from coursepack.distill.recipe import TrainRecipe, objective_values, resolve_objective
from coursepack.distill.renamed import check_renamed
from coursepack.distill.targets.stores import open_stores
from coursepack.errors import RecipeError
from coursepack.imports import check_trusted


def resolve_recipe(
    values: dict[str, Any], where: str, *, smoke: bool = False, trust_code: bool = False
) -> TrainRecipe:
    """Return a complete recipe from plain values, with missing fields taken from the stores and the method.

    Args:
        values: recipe fields; changed in place.
        where: file or command that the fields came from, for error messages.
        smoke: open neither stores nor sources, for a smoke run.
        trust_code: allow stores to name Python code for sources and views.

    Raises:
        UntrustedCode: a store names Python code for a source or view that `values` leaves out, and
            `trust_code` is false.
        RecipeError: a field is missing, unknown or out of range.
    """
    if isinstance(values.get("view"), str):
        values["view"] = view_recipe(values["view"])
    check_renamed(values, where)
    _check_fields(values, where)
    if "student" not in values:
        raise RecipeError("there is no student: give --student NAME, or a recipe file")
    stores = values.get("stores") or ()
    values.setdefault("method", _usual_method(values))
    stored_root = None
    if stores and not smoke:
        first = open_stores(stores)[0]
        identity, holder = first.manifest.identity, f"store {first.address!r}"
        stored = str(identity["source"]["name"])
        if "source" not in values:
            values["source"] = check_trusted(stored, holder, trust_code=trust_code)
        if "view" not in values:
            values["view"] = stored_view(identity["view"]["recipe"], holder, trust_code=trust_code)
        if str(values["source"]).partition(":")[0] == stored.partition(":")[0]:
            stored_root = first.manifest.source_root
    if "source" not in values:
        raise RecipeError("there is nothing to train on: give --source NAME[:SPLIT], or --store")
    root = Path(values["root"]) if values.get("root") else None
    if smoke:
        classes = len(open_source(stand_in(values["source"])).class_names)
    else:
        source = open_stored(values["source"], root, stored_root)
        values["source"], classes = source.name, len(source.class_names)
        if root is None and stored_root is not None:
            root, values["root"] = Path(stored_root), stored_root
        if "evaluation" in values:
            values["evaluation"] = open_source(values["evaluation"], root).name
    if "evaluation" not in values:
        values["evaluation"] = evaluation_spec(values["source"])
    changes = values.get("objective") or {}
    values["objective"] = resolve_objective(values["method"], changes, where, classes=classes)
    if "view" not in values:
        raise RecipeError(
            f"there is no view recipe: give --view NAME ({', '.join(PRESETS)}) or --view FILE.yaml"
        )
    return parse_config(TrainRecipe, values, where)


def _usual_method(values: dict[str, Any]) -> str:
    return "kd" if values.get("stores") else "supervised"


def _check_fields(values: dict[str, Any], where: str) -> None:
    """Check the given fields before anything is opened.

    Fields of the objective are checked together with the method's defaults, which they may replace in part.
    """
    changes, method = values.get("objective"), values.get("method", _usual_method(values))
    if isinstance(changes, dict) and isinstance(method, str) and method in METHODS:
        changes = objective_values(method, changes, classes=1)
    check_given(TrainRecipe, values if changes is None else {**values, "objective": changes}, where)
