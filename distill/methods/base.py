"""Base types of methods: an objective config with its formula, source and evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from coursepack.distill.fusion import FUSIONS
from coursepack.distill.objective_config import ObjectiveConfig
from coursepack.errors import RecipeError

Evidence = Literal["paper", "release", "re-implementation", "recalled"]
"""Best source that formula and numbers were checked against: the paper, its authors' code, code by others, or
memory alone."""


@dataclass(frozen=True)
class Method:
    """Named objective whose fields a recipe can override."""

    formula: str
    """Formula of the loss, in one line."""
    source: str
    """Paper and section or equation."""
    objective: ObjectiveConfig
    """Default config; fields in `per_class` are not yet divided by the number of classes."""
    evidence: Evidence | None = None
    """What stands behind formula and numbers; None for methods that are nobody's in particular."""
    per_class: tuple[str, ...] = ()
    """Fields of the objective whose default is divided by the number of classes."""
    note: str = ""
    """Conversions from the paper's conventions, and values that could not be verified."""

    def values(self, classes: int | None) -> dict[str, Any]:
        """Return the default config for a number of classes, as plain values.

        Raises:
            RecipeError: a default depends on the number of classes, and `classes` is None.
        """
        values = self.objective.model_dump()
        for field in self.per_class:
            if classes is None:
                raise RecipeError(
                    f"the default of objective.{field} is {values[field]:g} / C, but the number of classes C "
                    "is not known: give classes"
                )
            values[field] = from_mean_reduction(values[field], classes)
        return values

    @property
    def needs(self) -> tuple[str, ...]:
        """Needs of the method, in words."""
        needs, lines = self.objective.needs(), []
        if needs.logits:
            fusion = FUSIONS[self.objective.fusion.name]
            which = "one teacher per batch" if fusion.choose is not None else "every teacher"
            lines.append(f"logits of {'one teacher' if fusion.constant else which}")
        lines += ["all classes in the stores (no topk encoding)"] if needs.dense_logits else []
        lines += ["a tapped feature of every teacher"] if needs.pairs is not None else []
        lines += (
            [f"{needs.teacher_head}: one teacher that ends in a linear layer"] if needs.teacher_head else []
        )
        lines += ["the head of every teacher"] if needs.teacher_heads else []
        lines += ["one label per sample (no mixed images)"] if needs.one_label else []
        lines += ["whole batches: " + ", ".join(needs.whole_batch)] if needs.whole_batch else []
        lines += [f"one process: {needs.one_process}"] if needs.one_process else []
        lines += ["labels"] if needs.labels else []
        return tuple(lines)


def from_mean_reduction(coefficient: float, classes: int) -> float:
    """Convert a coefficient published for `KLDivLoss(reduction="mean")`, which also divides by the classes.

    The result is rounded to twelve decimals, to be readable in recipe files.

    >>> from_mean_reduction(1.4, classes=10)
    0.14
    """
    return round(coefficient / classes, 12)


def objective(**values: Any) -> ObjectiveConfig:
    """Return an objective config from plain values."""
    return ObjectiveConfig.model_validate(values)


KD: dict[str, Any] = {"soft_weight": 0.9, "hard_weight": 0.1, "temperature": 4.0}
"""Values of Hinton's method in RepDistiller (Tian et al. 2020). Methods with unknown values use them too, so
that they differ from `kd` only in the method itself."""
