"""Renamed recipe keys: old keys in new recipes are refused; recipes of finished runs are upgraded."""

from __future__ import annotations

import copy
from typing import Any

from coursepack.errors import RecipeError

RENAMED = {
    "optimiser": "optimizer",
    "objective.teacher_weights": "objective.fusion.weights",
    "objective.fusion.l2": "objective.terms.latents.weight",
    "objective.relations.angle": "objective.terms.angle.weight",
    "objective.relations.distance": "objective.terms.distance.weight",
    "objective.relations.student": "objective.terms.angle.student",
    "objective.hints": "objective.terms.hint",
    "objective.term_weight": "objective.terms.NAME.weight",
    "objective.term": "objective.terms.NAME",
}
"""New key by old key."""


def check_renamed(values: dict[str, Any], where: str) -> None:
    """Check that a recipe's plain values have no key that was renamed.

    Raises:
        RecipeError: an old key is present; the message lists the new name of each.
    """
    old_keys = [old for old in RENAMED if _has(values, old)]
    if old_keys:
        lines = "\n".join(f"  {old}: now {RENAMED[old]}" for old in old_keys)
        raise RecipeError(f"{where} has keys that were renamed:\n{lines}")


def upgrade_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Return the plain values of a recipe that an earlier version wrote, with the current keys."""
    from coursepack.distill.fusion import FUSIONS  # imports torch, which `check_renamed` does without

    if not any(_has(values, old) for old in RENAMED):
        return values
    values = copy.deepcopy(values)
    if "optimiser" in values:
        values["optimizer"] = values.pop("optimiser")
    objective = values["objective"]
    fusion, terms = objective.get("fusion") or {"name": "fixed"}, {}
    relations, hints = objective.pop("relations", {}), objective.pop("hints", {})
    for name in ("angle", "distance"):
        if relations.get(name):
            terms[name] = {"weight": relations[name], "student": relations.get("student", "probs")}
    penalty = fusion.pop("l2", 0.0)
    if fusion["name"] == "adaptive":
        terms["latents"] = {"weight": penalty}
    if hints.get("weight"):
        terms["hint"] = hints
    given = objective.pop("teacher_weights", None)
    if given is not None:
        fusion["weights"] = given
    known = FUSIONS[fusion["name"]].config.model_fields
    objective["fusion"] = {name: value for name, value in fusion.items() if name in known}
    objective["terms"] = terms
    for name in ("term", "term_weight"):
        objective.pop(name, None)
    return values


def _has(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True
