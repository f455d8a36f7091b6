"""Descriptions of methods as plain values, as `distill methods` prints them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.distill.fusion import FUSIONS
from coursepack.distill.methods import METHODS

if TYPE_CHECKING:
    from coursepack.distill.methods.base import Method


def describe(name: str) -> dict[str, Any]:
    """Return a method as plain values: formula, source, needs, and defaults that differ from the config's."""
    method = METHODS[name]
    fusion = FUSIONS[method.objective.fusion.name]
    fused = method.objective.needs().fused
    defaults = method.objective.model_dump(mode="json", exclude_defaults=True)
    defaults |= {field: f"{defaults[field]:g} / C" for field in method.per_class}
    for key, term in method.objective.terms.items():
        defaults["terms"][key]["weight"] = term.weight
        if term.term == key:
            del defaults["terms"][key]["term"]
    return {
        "name": name,
        "formula": method.formula,
        "source": method.source,
        "evidence": method.evidence,
        "needs": list(method.needs),
        "note": method.note,
        "fusion": {"name": method.objective.fusion.name, "formula": fusion.formula} if fused else None,
        "combine": _combine(method) if fused else None,
        "defaults": defaults,
    }


def _combine(method: Method) -> str:
    given = method.objective.combine
    return FUSIONS[method.objective.fusion.name].combine if given == "auto" else given
