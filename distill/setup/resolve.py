"""From the fields that someone gave to a whole recipe: what stores and method say fills the gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coursepack.config import check_given, parse_config
from coursepack.data import open_source, view_recipe
from coursepack.data.sources import evaluation_spec, open_stored
from coursepack.data.sources.fake import stand_in
from coursepack.data.views import stored_view
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.renamed import check_renamed
from coursepack.distill.targets.stores import open_stores
from coursepack.errors import RecipeError
from coursepack.imports import check_trusted


def complete(
    values: dict[str, Any], where: str, *, smoke: bool = False, trust_code: bool = False
) -> TrainRecipe:
    """Fill in what the stores and the method say, and check the whole; for a smoke run open nothing.

    Raises:
        UntrustedCode: a store names Python code for a source or a view that the values leave out, and
            `trust_code` is false.
        RecipeError: something is missing, unknown or out of range.
    """
    if isinstance(values.get("view"), str):
        values["view"] = view_recipe(values["view"])
    check_renamed(values, where)
    check_given(TrainRecipe, values, where)
    if "student" not in values:
        raise RecipeError("there is no student: give --student NAME, or a recipe file")
    stores = values.get("stores") or ()
    values.setdefault("method", "kd" if stores else "supervised")
    kept = None
    if stores and not smoke:
        first = open_stores(stores)[0]
        identity, holder = first.manifest.identity, f"store {str(first.path)!r}"
        stored = str(identity["source"]["name"])
        if "source" not in values:
            values["source"] = check_trusted(stored, holder, trust_code=trust_code)
        if "view" not in values:
            values["view"] = stored_view(identity["view"]["recipe"], holder, trust_code=trust_code)
        if str(values["source"]).partition(":")[0] == stored.partition(":")[0]:
            kept = first.manifest.source_root
    if "source" not in values:
        raise RecipeError("there is nothing to train on: give --source NAME[:SPLIT], or --store")
    root = Path(values["root"]) if values.get("root") else None
    if smoke:
        classes = len(open_source(stand_in(values["source"])).class_names)
    else:
        source = open_stored(values["source"], root, kept)
        values["source"], classes = source.name, len(source.class_names)
        if root is None and kept is not None:
            root, values["root"] = Path(kept), kept
        if "evaluation" in values:
            values["evaluation"] = open_source(values["evaluation"], root).name
    values.setdefault("evaluation", evaluation_spec(values["source"]))
    changes = values.get("objective") or {}
    values["objective"] = resolve_objective(values["method"], changes, where, classes=classes)
    if "view" not in values:
        raise RecipeError("there is no view recipe: give --view PRESET (none, digits, or a YAML file)")
    return parse_config(TrainRecipe, values, where)
