"""Methods: named objectives with their formula, source and conversions from published conventions.

Notation: z student's logits, z_k teacher k's, y label, q = softmax(z / T), P_k = softmax(z_k / T), C classes.
All terms are means over the batch of sums over classes (`batchmean`), in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coursepack.distill.fusion import FUSIONS
from coursepack.distill.objective_config import ObjectiveConfig
from coursepack.errors import RecipeError


@dataclass(frozen=True)
class Method:
    """Named objective whose fields a recipe can override."""

    formula: str
    """Formula of the loss, in one line."""
    source: str
    """Paper and section or equation."""
    objective: ObjectiveConfig
    """Default config; fields in `per_class` are not yet divided by the number of classes."""
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
            one = FUSIONS[self.objective.fusion.name].choose is not None
            lines.append("logits of one teacher per batch" if one else "logits of every teacher")
        lines += ["all classes in the stores (no topk encoding)"] if needs.dense_logits else []
        lines += ["a tapped feature of every teacher"] if needs.pairs is not None else []
        lines += ["one label per sample (no mixed images)"] if needs.one_label else []
        lines += ["whole batches: " + ", ".join(needs.whole_batch)] if needs.whole_batch else []
        return (*lines, "labels")


def from_mean_reduction(coefficient: float, classes: int) -> float:
    """Convert a coefficient published for `KLDivLoss(reduction="mean")`, which also divides by the classes.

    The result is rounded to twelve decimals, to be readable in recipe files.

    >>> from_mean_reduction(1.4, classes=10)
    0.14
    """
    return round(coefficient / classes, 12)


# Published coefficients that follow another convention than docs/decisions/reduction.md, all of them:
#
# AMTML-KD    its notebooks give `reduction="mean"` KL the factor 2 alpha T² with alpha = 0.7, and CE
#             1 - alpha; in our units 2 alpha / C, computed when the recipe is resolved (`per_class`).
_AMTML_SOFT = 2 * 0.7
# CA-MKD      its release divides the weighted sum by K once more, although its weights sum to one. Here as in
#             the paper; for the release's size set soft_weight to 1 / K.
_CA_MKD_SOFT = 1.0
# EBKD        in the release of CA-MKD weights sum to K - 1 and the sum is divided by K. Here weights sum to
#             one; for the release's size set soft_weight to (K - 1) / K.
_EBKD_SOFT = 1.0

_KD: dict[str, Any] = {"soft_weight": 0.9, "hard_weight": 0.1, "temperature": 4.0}
"""Values of Hinton's method in RepDistiller (Tian et al. 2020). Methods with unknown values use them too, so
that they differ from `kd` only in the method itself."""
_FLSW: dict[str, Any] = {"kind": "flsw", "slope": 40.0, "gamma": 0.5}
_AMTML: dict[str, Any] = {
    "soft_weight": _AMTML_SOFT,
    "hard_weight": 0.3,
    "temperature": 5.0,
    "fusion": {"name": "adaptive"},
    "terms": {"angle": {}, "latents": {"weight": 0.1}},
}
_WEN = "Wen, Lai and Qian 2019, arXiv 1911.07471"
_LIU = "Liu, Zhang and Wang 2020, arXiv 2103.04062"


def _config(**values: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(values)


METHODS: dict[str, Method] = {
    "supervised": Method(
        formula="CE(z, y)",
        source="no teacher",
        objective=_config(soft_weight=0.0, hard_weight=1.0),
    ),
    "kd": Method(
        formula="0.9 T² KL(sum_k w_k P_k || q) + 0.1 CE, T = 4",
        source="Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2; weights of Tian et al. 2020",
        objective=_config(**_KD),
    ),
    "avg": Method(
        formula="0.9 T² (1/K) sum_k KL(P_k || q) + 0.1 CE",
        source="AVER in the release of Zhang et al. 2022 (CA-MKD)",
        objective=_config(**_KD, fusion={"name": "uniform"}),
        note="the student's gradient is that of kd with equal weights; the value is not",
    ),
    "best": Method(
        formula="0.9 T² KL(P_b || q) + 0.1 CE, b the teacher with the highest accuracy",
        source="the usual single-teacher baseline",
        objective=_config(**_KD, fusion={"name": "best"}),
    ),
    "random": Method(
        formula="0.9 T² KL(P_r || q) + 0.1 CE, r drawn anew for every batch",
        source="Shen, He and Xue 2019 (MEAL), arXiv 1812.02425, section 3, without its adversarial part",
        objective=_config(**_KD, fusion={"name": "random"}),
    ),
    "ka-ps": Method(
        formula="0.9 T² KL(sum_k w_k A(P_k) || q) + 0.1 CE, A swaps label and top class of a wrong teacher",
        source=f"{_WEN}, section 3.1 (probability shift)",
        objective=_config(**_KD, adjustment="shift"),
        note="the paper's values were not available; those of kd are used",
    ),
    "ka-lsr": Method(
        formula="as ka-ps, but a wrong teacher's row becomes (1 - eps) onehot + eps / C",
        source=f"{_WEN}, section 3.1 (label smoothing regularisation)",
        objective=_config(**_KD, adjustment="smooth", smoothing=0.1),
        note="the smoothed label is not softened by T; the paper's values were not available",
    ),
    "dtd-flsw": Method(
        formula="0.9 mean_x T_x² KL(P(T_x) || q(T_x)) + 0.1 CE, T_x = T_0 + slope (mean omega - omega_x), "
        "omega = (1 - cos(z, z_t))^gamma",
        source=f"{_WEN}, section 3.2 (focal-loss-style weights)",
        objective=_config(soft_weight=0.9, hard_weight=0.1, temperature=10.0, dynamic_temperature=_FLSW),
        note="T_0 = 10 and slope 40 are from a re-implementation and not verified in the paper. z_t is the "
        "weighted mean of the teachers' logits",
    ),
    "dtd-cwsm": Method(
        formula="as dtd-flsw with omega = 1 / max softmax(z)",
        source=f"{_WEN}, section 3.2 (confidence-weighted by student max)",
        objective=_config(**_KD, dynamic_temperature={"kind": "cwsm", "slope": 1.0}),
        note="slope 1 as in TextBrewer's documentation; the paper's was not available",
    ),
    "ka-dtd": Method(
        formula="dtd-flsw on teachers adjusted as in ka-ps, before omega is computed",
        source=f"{_WEN}, section 3.3",
        objective=_config(
            soft_weight=0.9, hard_weight=0.1, temperature=10.0, adjustment="shift", dynamic_temperature=_FLSW
        ),
        note="as dtd-flsw",
    ),
    "amtml": Method(
        formula="(1.4 / C) T² KL(sum_k w_k P_k || q) + 0.3 CE + angle + 0.1 (||v||² + sum_k ||theta_k||²), "
        "T = 5, w = softmax_k(v . (theta_k * beta))",
        source=f"{_LIU}, sections 3.2 and 3.3; numbers of its notebooks",
        objective=_config(**_AMTML),
        per_class=("soft_weight",),
        note="soft_weight is 2 alpha / C, since the notebooks' KL divides by the C classes as well. Trained "
        "jointly; fusion.joint_epochs freezes the latents after the release's first phase. Cross-entropy is "
        "at T = 1, as in all of the release's notebooks but LR_adaptive_learning, which takes it at T = 5. "
        "Angles are of the student's probabilities: the notebooks take its log-probabilities or logits "
        "(terms.angle.student), and add distances (terms.distance.weight=1)",
    ),
    "amtml-hints": Method(
        formula="amtml + sum_g mean (u_g(student's layer g) - teacher's layer g)²",
        source=f"{_LIU}, section 3.4",
        objective=_config(**{**_AMTML, "terms": {"angle": {}, "hint": {}, "latents": {}}}),
        per_class=("soft_weight",),
        note="as amtml; adapters are trained (in the release they are in no optimiser), and features are "
        "compared as they are (the release divides both by their norm over channels)",
    ),
    "ca-mkd": Method(
        formula="T² sum_k w_k KL(P_k || q) + CE, w_k = (1 - softmax_k CE(z_k, y)) / (K - 1), T = 4",
        source="Zhang, Chen and Wang 2022, arXiv 2201.00007, equations 2 and 3, without its feature term",
        objective=_config(
            soft_weight=_CA_MKD_SOFT, hard_weight=1.0, temperature=4.0, fusion={"name": "confidence"}
        ),
        note="the release divides by K once more: set soft_weight=1/K for that",
    ),
    "ebkd": Method(
        formula="T² sum_k w_k KL(P_k || q) + CE, w_k = (1 - H_k / sum_j H_j) / (K - 1), T = 4",
        source="Kwon et al. 2020, as in the release of Zhang et al. 2022 (CA-MKD)",
        objective=_config(
            soft_weight=_EBKD_SOFT, hard_weight=1.0, temperature=4.0, fusion={"name": "entropy"}
        ),
        note="in that release weights sum to K - 1 and are divided by K: set soft_weight=(K-1)/K for that",
    ),
}


def describe(name: str) -> dict[str, Any]:
    """Return a method as plain values: formula, source, needs, and defaults that differ from the config's."""
    method = METHODS[name]
    fusion = FUSIONS[method.objective.fusion.name]
    teachers = method.objective.needs().teachers
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
        "needs": list(method.needs),
        "note": method.note,
        "fusion": {"name": method.objective.fusion.name, "formula": fusion.formula} if teachers else None,
        "combine": _combine(method) if teachers else None,
        "defaults": defaults,
    }


def _combine(method: Method) -> str:
    given = method.objective.combine
    return FUSIONS[method.objective.fusion.name].combine if given == "auto" else given
