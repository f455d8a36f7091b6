"""From the fields that someone gave to a whole recipe: what stores and method say fills the gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coursepack.config import check_given, parse_config
from coursepack.data import open_source, view_recipe
from coursepack.data.sources import evaluation_spec, open_stored
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.targets import open_stores
from coursepack.errors import RecipeError


def complete(values: dict[str, Any], where: str, *, smoke: bool = False) -> TrainRecipe:
    """Fill in what the stores and the method say, and check the whole; for a smoke run open nothing.

    Raises:
        RecipeError: something is missing, unknown or out of range.
    """
    if isinstance(values.get("view"), str):
        values["view"] = view_recipe(values["view"])
    check_given(TrainRecipe, values, where)
    if "student" not in values:
        raise RecipeError("there is no student: give --student NAME, or a recipe file")
    stores = values.get("stores") or ()
    values.setdefault("method", "kd" if stores else "supervised")
    values["objective"] = resolve_objective(values["method"], values.get("objective") or {}, where)
    kept = None
    if stores and not smoke:
        manifest = open_stores(stores)[0].manifest
        stored = str(manifest.identity["source"]["name"])
        values.setdefault("source", stored)
        values.setdefault("view", manifest.identity["view"]["recipe"])
        if str(values["source"]).partition(":")[0] == stored.partition(":")[0]:
            kept = manifest.source_root
    if "source" not in values:
        raise RecipeError("there is nothing to train on: give --source NAME[:SPLIT], or --store")
    root = Path(values["root"]) if values.get("root") else None
    if not smoke:
        values["source"] = open_stored(values["source"], root, kept).name
        if root is None and kept is not None:
            root, values["root"] = Path(kept), kept
        if "evaluation" in values:
            values["evaluation"] = open_source(values["evaluation"], root).name
    values.setdefault("evaluation", evaluation_spec(values["source"]))
    if "view" not in values:
        raise RecipeError("there is no view recipe: give --view PRESET (none, digits, or a YAML file)")
    return parse_config(TrainRecipe, values, where)
