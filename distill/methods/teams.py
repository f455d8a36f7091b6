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
#             the paper; for the release's size set soft_weight to 1 / K, and the weight of its feature term,
#             which is divided by K as well, to 50 / K.
_CA_MKD_SOFT = 1.0
# EBKD        in the release of CA-MKD weights sum to K - 1 and the sum is divided by K. Here weights sum to
#             one; for the release's size set soft_weight to (K - 1) / K.
_EBKD_SOFT = 1.0

_PRO_KD_EPOCHS = 30
"""Epochs in which the temperature of Pro-KD falls: three quarters of the default run."""

_AMTML: dict[str, Any] = {
    "soft_weight": _AMTML_SOFT,
    "hard_weight": 0.3,
    "temperature": 5.0,
    "fusion": {"name": "adaptive"},
    "terms": {"angle": {}, "latents": {"weight": 0.1}},
}
_UHC: dict[str, Any] = {"soft_weight": 1.0, "hard_weight": 0.0, "temperature": 4.0}
_VONGKULBHISAL = (
    "Vongkulbhisal, Vinayavekhin and Visentini-Scarzanella 2019 (UHC), CVPR 2019, arXiv 1904.06062; "
    "objective inferred from a re-implementation"
)
_UHC_NOTE = (
    "for teachers that know different classes (precompute run --classes). Labels are not used, as the paper "
    "has none; T is that of kd, since the paper's was not at hand. "
)
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
    "sequence": Method(
        formula="0.9 T² KL(P_k || q) + 0.1 CE, T = 4, k the teacher of the epoch's phase",
        source="sequential teaching: teachers in order, with the weights and T of kd",
        objective=objective(**KD, fusion={"name": "sequence"}),
        note="teachers share the epochs of the run in the order of the stores; fusion.epochs gives each its "
        "own number, and fusion.label_epochs a last phase on labels alone, with hard_weight",
    ),
    "pro-kd": Method(
        formula="0.9 T² KL(P_k || q) + 0.1 CE, k the teacher's checkpoint of the epoch's phase, T from 4 to "
        "1 in 30 epochs",
        source="Rezagholizadeh et al. 2021 (Pro-KD), arXiv 2110.08532; only its abstract was at hand",
        evidence="recalled",
        objective=objective(
            **{**KD, "temperature": {"shape": "warmup", "start": 4.0, "end": 1.0, "epochs": _PRO_KD_EPOCHS}},
            fusion={"name": "sequence"},
        ),
        note="follows the stores of a teacher's checkpoints in their order, with a temperature that falls; "
        "the paper's formula was not at hand, and the weights are those of kd. annealing-kd is the nearest "
        "method whose formula is known",
    ),
    "monitored": Method(
        formula="0.9 T² sum_k w_k KL(P_k || q) + 0.1 CE, T = 4, w_k equal for the teachers with "
        "argmax z_k = y and 0 for the others",
        source="teachers monitored by the labels, with the weights and T of kd",
        objective=objective(**KD, fusion={"name": "monitored"}),
        note="a sample on which no teacher is right is trained on 0.1 CE alone. fusion.rule=better counts "
        "teachers whose cross-entropy to the label is below the student's instead, and takes mixed labels",
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
        note="as amtml; adapters are trained (in the release they are in no optimizer), and features are "
        "compared as they are (the release divides both by their norm over channels)",
    ),
    "amtml-gated": Method(
        formula="0.9 T² KL(sum_k w_k P_k || q) + 0.1 CE - log sum_k w_k p_k(y) + "
        "0.01 (||v||² + sum_k ||theta_k||²), T = 4, p_k = softmax(z_k), w = softmax_k(v . (theta_k * beta)), "
        "constant in the divergence",
        source="ours: the weights of amtml, trained by the labels, with the weights and T of kd",
        objective=objective(**KD, fusion={"name": "gated"}, terms={"latents": {"weight": 0.01}}),
        note="in amtml the divergence trains the weights, and prefers the teacher that is easiest to "
        "imitate. Here only the labels do; latents begin at 0.1 instead of 1 and are penalized by 0.01 "
        "instead of 0.1. terms.gate.weight is the weight of the mixture's cross-entropy. terms.angle={} and "
        "terms.hint={} add the angles and hints of amtml; fusion.student_gradient=true passes the gradient "
        "of the weights on to the student, and fusion.divergence_gradient=true adds the divergence's",
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
    "ca-mkd-features": Method(
        formula="ca-mkd + 50 sum_k w'_k mean (h_k - f_k)², h_k = ReLU(BN(conv(student's last map))), "
        "w'_k = (1 - softmax_k CE(head_k(h_k), y)) / (K - 1)",
        source="Zhang, Chen and Wang 2022, arXiv 2201.00007, and its release",
        evidence="release",
        objective=objective(
            soft_weight=_CA_MKD_SOFT,
            hard_weight=1.0,
            temperature=4.0,
            fusion={"name": "confidence"},
            terms={"confidence_hint": {"weight": 50.0}},
        ),
        note="as ca-mkd; the release divides the feature term by K once more too: set "
        "terms.confidence_hint.weight=50/K for that. It leaves that term out in the first epoch, and a "
        "teacher with a smaller map leaves the student's pooled map to the teachers after it; here every "
        "teacher is compared with the student's own map, in every epoch",
    ),
    "ebkd": Method(
        formula="T² sum_k w_k KL(P_k || q) + CE, w_k = (1 - H_k / sum_j H_j) / (K - 1), T = 4",
        source="Kwon et al. 2020, as in the release of Zhang et al. 2022 (CA-MKD)",
        evidence="re-implementation",
        objective=objective(
            soft_weight=_EBKD_SOFT, hard_weight=1.0, temperature=4.0, fusion={"name": "entropy"}
        ),
        note="in that release weights sum to K - 1 and are divided by K: set soft_weight=(K-1)/K for that",
    ),
    "ae-kd": Method(
        formula="0.9 T² sum_k w_k KL(P_k || q) + CE, T = 4, w = argmin |sum_k w_k mean_x (q - P_k)|², "
        "sum_k w_k = 1, 0 <= w_k <= 0.6",
        source="Du et al. 2020 (AE-KD), NeurIPS 2020; numbers of its release",
        evidence="release",
        objective=objective(soft_weight=0.9, hard_weight=1.0, temperature=4.0, fusion={"name": "min_norm"}),
        note="the quadratic program is solved exactly; the release's solver has an absolute tolerance of "
        "1e-6 and returns (0.6, 0.4, 0, ...) for small gradients. Gradients are those of KL at the student's "
        "logits, at T and without adjustments",
    ),
    "you17": Method(
        formula="0.9 T² KL((1/K) sum_k P_k || q) + 0.1 CE + mean over triplets of max(0, 0.2 - o_ijk "
        "(d(i, j) - d(i, k))), o_ijk the order of d_k(i, j) and d_k(i, k) that most teachers have",
        source="You, Xu, Xu and Tao 2017 (Learning from multiple teacher networks), KDD 2017",
        evidence="recalled",
        objective=objective(**KD, terms={"triplet_order": {}}),
        note="the paper's text was not at hand: weights and T are those of kd, the margin is that of "
        "AMTML-KD's notebooks, and all triplets of a batch are used. The last layers are compared by "
        "default; set terms.triplet_order.pairs for intermediate ones",
    ),
    "meal": Method(
        formula="KL(P_r || q) + 1/2 (BCE(D(z), (1, 0)) + BCE(D(z_r), (0, 1))), T = 1, r drawn anew for every "
        "batch, D a discriminator whose gradient is reversed for the student",
        source="Shen, He and Xue 2019 (MEAL), arXiv 1812.02425, section 3; numbers of its release",
        evidence="release",
        objective=objective(
            soft_weight=1.0,
            hard_weight=0.0,
            temperature=1.0,
            fusion={"name": "random"},
            terms={"discriminator": {}},
        ),
        note="logits only, as in the release's ensembles; labels are not used. The release reverses the "
        "gradient only with --grl, and its discriminator ends in a ReLU: set "
        "terms.discriminator.reverse=false, last_relu=true and least_width=1 for that. "
        "Its cross-entropy is KL and the teacher's entropy, which is constant",
    ),
    "uhc-ce": Method(
        formula="T² KL(u || q), T = 4, u = argmin -sum_k sum_{L_k} P_k log(u / sum_{L_k} u), L_k the classes "
        "that teacher k knows",
        source=_VONGKULBHISAL,
        evidence="re-implementation",
        objective=objective(**_UHC, fusion={"name": "unify", "form": "cross_entropy"}),
        note=_UHC_NOTE
        + "Solved by Newton's method; the re-implementation takes 3,000 gradient steps, with an error in the "
        "gradient, and its student minimizes KL(q || u)",
    ),
    "uhc-mf": Method(
        formula="T² KL(u || q), T = 4, u = argmin sum_k sum_{L_k} (P_k - v_k u)² with any v_k, normalized",
        source=_VONGKULBHISAL,
        evidence="re-implementation",
        objective=objective(**_UHC, fusion={"name": "unify", "form": "factorization"}),
        note=_UHC_NOTE + "The factorization of probabilities",
    ),
    "uhc-mf-logits": Method(
        formula="T² KL(softmax(u / T) || q), T = 4, u = argmin sum_k sum_{L_k} (z_k - v_k u - c_k)² with any "
        "v_k >= 0 and c_k, and a ridge of 0.01 towards v = 1",
        source=_VONGKULBHISAL,
        evidence="re-implementation",
        objective=objective(**_UHC, fusion={"name": "unify", "form": "logit_factorization"}),
        note=_UHC_NOTE + "The factorization of logits. The re-implementation's ridge pulls v and u to zero, "
        "which alone decides the scale of u, its update of v leaves c out, and it takes 3,000 "
        "iterations in turn",
    ),
    "uhc-naive": Method(
        formula="T² KL(u || q), T = 4, u the mean of P_k over the teachers that know a class, normalized",
        source="the baseline of uhc-ce and uhc-mf",
        objective=objective(**_UHC, fusion={"name": "unify", "form": "mean"}),
        note=_UHC_NOTE + "A teacher that does not know a sample's class counts as much as one that does",
    ),
}
