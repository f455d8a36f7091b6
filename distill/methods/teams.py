"""Methods that weight several teachers."""

from __future__ import annotations

from typing import Any

from coursepack.distill.methods.base import KD, Method, objective

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

_AMTML: dict[str, Any] = {
    "soft_weight": _AMTML_SOFT,
    "hard_weight": 0.3,
    "temperature": 5.0,
    "fusion": {"name": "adaptive"},
    "terms": {"angle": {}, "latents": {"weight": 0.1}},
}
_LIU = "Liu, Zhang and Wang 2020, arXiv 2103.04062"

TEAMS: dict[str, Method] = {
    "avg": Method(
        formula="0.9 T² (1/K) sum_k KL(P_k || q) + 0.1 CE",
        source="AVER in the release of Zhang et al. 2022 (CA-MKD)",
        evidence="release",
        objective=objective(**KD, fusion={"name": "uniform"}),
        note="the student's gradient is that of kd with equal weights; the value is not",
    ),
    "best": Method(
        formula="0.9 T² KL(P_b || q) + 0.1 CE, b the teacher with the highest accuracy",
        source="the usual single-teacher baseline",
        objective=objective(**KD, fusion={"name": "best"}),
    ),
    "random": Method(
        formula="0.9 T² KL(P_r || q) + 0.1 CE, r drawn anew for every batch",
        source="Shen, He and Xue 2019 (MEAL), arXiv 1812.02425, section 3, without its adversarial part",
        evidence="paper",
        objective=objective(**KD, fusion={"name": "random"}),
    ),
    "amtml": Method(
        formula="(1.4 / C) T² KL(sum_k w_k P_k || q) + 0.3 CE + angle + 0.1 (||v||² + sum_k ||theta_k||²), "
        "T = 5, w = softmax_k(v . (theta_k * beta))",
        source=f"{_LIU}, sections 3.2 and 3.3; numbers of its notebooks",
        evidence="release",
        objective=objective(**_AMTML),
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
        evidence="release",
        objective=objective(**{**_AMTML, "terms": {"angle": {}, "hint": {}, "latents": {}}}),
        per_class=("soft_weight",),
        note="as amtml; adapters are trained (in the release they are in no optimiser), and features are "
        "compared as they are (the release divides both by their norm over channels)",
    ),
    "ca-mkd": Method(
        formula="T² sum_k w_k KL(P_k || q) + CE, w_k = (1 - softmax_k CE(z_k, y)) / (K - 1), T = 4",
        source="Zhang, Chen and Wang 2022, arXiv 2201.00007, equations 2 and 3, without its feature term",
        evidence="release",
        objective=objective(
            soft_weight=_CA_MKD_SOFT, hard_weight=1.0, temperature=4.0, fusion={"name": "confidence"}
        ),
        note="the release divides by K once more: set soft_weight=1/K for that",
    ),
    "ebkd": Method(
        formula="T² sum_k w_k KL(P_k || q) + CE, w_k = (1 - H_k / sum_j H_j) / (K - 1), T = 4",
        source="Kwon et al. 2020, as in the release of Zhang et al. 2022 (CA-MKD)",
        evidence="release",
        objective=objective(
            soft_weight=_EBKD_SOFT, hard_weight=1.0, temperature=4.0, fusion={"name": "entropy"}
        ),
        note="in that release weights sum to K - 1 and are divided by K: set soft_weight=(K-1)/K for that",
    ),
}
