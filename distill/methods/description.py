"""Descriptions of methods as plain values and as a table, as `distill methods` prints them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.distill.fusion import FUSIONS
from coursepack.distill.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coursepack.distill.losses.base import Needs
    from coursepack.distill.methods.base import Method

NEEDS: dict[str, Callable[[Needs], object]] = {
    "logits": lambda needs: needs.logits,
    "all-classes": lambda needs: needs.dense_logits,
    "features": lambda needs: needs.pairs,
    "teacher-head": lambda needs: needs.teacher_head or needs.teacher_heads,
    "embedding": lambda needs: needs.embedding,
    "one-label": lambda needs: needs.one_label,
    "labels": lambda needs: needs.labels,
    "whole-batch": lambda needs: needs.whole_batch,
    "one-process": lambda needs: needs.one_process,
    "peers": lambda needs: needs.peers,
}
"""Needs by the name under which methods are listed and filtered."""


def needs_of(name: str) -> list[str]:
    """Return the names of a method's needs."""
    return _names_of(METHODS[name])


def _names_of(method: Method) -> list[str]:
    needs = method.objective.needs()
    return [need for need, holds in NEEDS.items() if holds(needs)]


def describe(name: str, changed: Method | None = None) -> dict[str, Any]:
    """Return a method as plain values: formula, source, needs, and values that differ from the config's.

    Args:
        name: name of the method.
        changed: the method with other values than its defaults.
    """
    method = changed or METHODS[name]
    fusion = FUSIONS[method.objective.fusion.name]
    fuses = method.objective.needs().fused
    defaults = method.objective.model_dump(mode="json", exclude_defaults=True)
    defaults |= {field: f"{defaults[field]:g} / C" for field in method.per_class}
    for key, term in method.objective.terms.items():
        defaults["terms"][key]["weight"] = term.model_dump(mode="json")["weight"]
        if term.term == key:
            del defaults["terms"][key]["term"]
    return {
        "name": name,
        "formula": method.formula,
        "source": method.source,
        "evidence": method.evidence,
        "need_names": _names_of(method),
        "needs": list(method.needs),
        "note": method.note,
        "fusion": {"name": method.objective.fusion.name, "formula": fusion.formula} if fuses else None,
        "combine": _combine(method) if fuses else None,
        "defaults": defaults,
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; vertical bars inside of cells are escaped."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def methods_table() -> str:
    """Return all methods as a table in Markdown."""
    header = ("method", "loss", "needs", "evidence", "source", "note")
    rows = []
    for name, method in METHODS.items():
        needs, evidence = ", ".join(needs_of(name)), method.evidence or "-"
        rows.append((f"`{name}`", method.formula, needs, evidence, method.source, method.note))
    return markdown_table(header, rows)


def _combine(method: Method) -> str:
    given = method.objective.combine
    return FUSIONS[method.objective.fusion.name].combine if given == "auto" else given
