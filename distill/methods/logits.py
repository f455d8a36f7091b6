"""Methods that read the logits of one teacher, or of several with fixed weights."""

from __future__ import annotations

from typing import Any

from coursepack.distill.methods.base import KD, Method, objective

_FLSW: dict[str, Any] = {"kind": "flsw", "slope": 40.0, "gamma": 0.5}
_BORN_AGAIN = "Furlanello et al. 2018, arXiv 1805.04770"
_WEN = "Wen, Lai and Qian 2019, arXiv 1911.07471"

# Published coefficients that follow another convention than docs/decisions/reduction.md, all of them:
#
# DKD         its release multiplies by min(epoch / 20, 1) with epochs counted from 1, ours are from 0:
#             (epoch + 1) / 20.
_DKD_WARMUP: dict[str, Any] = {"shape": "warmup", "start": 1 / 20, "end": 1.0, "epochs": 19}
# Tf-KD       the paper's KL has no T², ours has: 0.95 / T².
_TFKD_SELF = 0.95 / 20**2
# Annealing-KD  its script takes `mse_loss`, the mean over samples and classes, which is ours. The paper's
#             squared norm is the sum over classes: weight C.
_ANNEALED = 1.0

_ANNEALING_EPOCHS = 30
"""Epochs of the first phase of Annealing-KD: three quarters of the default run."""


def _step(start: float, end: float) -> dict[str, Any]:
    return {"shape": "step", "start": start, "end": end, "epochs": _ANNEALING_EPOCHS}


LOGITS: dict[str, Method] = {
    "supervised": Method(
        formula="CE(z, y)",
        source="no teacher",
        objective=objective(soft_weight=0.0, hard_weight=1.0),
    ),
    "kd": Method(
        formula="0.9 T² KL(sum_k w_k P_k || q) + 0.1 CE, T = 4",
        source="Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2; weights of Tian et al. 2020",
        evidence="paper",
        objective=objective(**KD),
    ),
    "ka-ps": Method(
        formula="0.9 T² KL(sum_k w_k A(P_k) || q) + 0.1 CE, A swaps label and top class of a wrong teacher",
        source=f"{_WEN}, section 3.1 (probability shift)",
        evidence="paper",
        objective=objective(**KD, adjustment="shift"),
        note="the paper's values were not available; those of kd are used",
    ),
    "ka-lsr": Method(
        formula="as ka-ps, but a wrong teacher's row becomes (1 - eps) onehot + eps / C",
        source=f"{_WEN}, section 3.1 (label smoothing regularisation)",
        evidence="paper",
        objective=objective(**KD, adjustment="smooth", smoothing=0.1),
        note="the smoothed label is not softened by T; the paper's values were not available",
    ),
    "dtd-flsw": Method(
        formula="0.9 mean_x T_x² KL(P(T_x) || q(T_x)) + 0.1 CE, T_x = T_0 + slope (mean omega - omega_x), "
        "omega = (1 - cos(z, z_t))^gamma",
        source=f"{_WEN}, section 3.2 (focal-loss-style weights)",
        evidence="re-implementation",
        objective=objective(soft_weight=0.9, hard_weight=0.1, temperature=10.0, dynamic_temperature=_FLSW),
        note="T_0 = 10 and slope 40 are from a re-implementation and not verified in the paper. z_t is the "
        "weighted mean of the teachers' logits",
    ),
    "dtd-cwsm": Method(
        formula="as dtd-flsw with omega = 1 / max softmax(z)",
        source=f"{_WEN}, section 3.2 (confidence-weighted by student max)",
        evidence="re-implementation",
        objective=objective(**KD, dynamic_temperature={"kind": "cwsm", "slope": 1.0}),
        note="slope 1 as in TextBrewer's documentation; the paper's was not available",
    ),
    "ka-dtd": Method(
        formula="dtd-flsw on teachers adjusted as in ka-ps, before omega is computed",
        source=f"{_WEN}, section 3.3",
        evidence="re-implementation",
        objective=objective(
            soft_weight=0.9, hard_weight=0.1, temperature=10.0, adjustment="shift", dynamic_temperature=_FLSW
        ),
        note="as dtd-flsw",
    ),
    "dkd": Method(
        formula="CE + T² (TCKD + 8 NCKD), T = 4: divergences of label against rest, and among the other "
        "classes",
        source="Zhao et al. 2022, arXiv 2203.08679",
        evidence="release",
        objective=objective(
            soft_weight=0.0, hard_weight=1.0, temperature=4.0, terms={"dkd": {"weight": _DKD_WARMUP}}
        ),
        note="terms.dkd.beta of the release depends on the pair: 2, 6 or 8 on CIFAR-100, 0.5 at T = 1 on "
        "ImageNet. Several teachers are compared as their mixture",
    ),
    "dist": Method(
        formula="CE + 2 T² (inter + gamma intra), T = 4: one minus Pearson's correlation with P, within "
        "samples and within classes",
        source="Huang et al. 2022, arXiv 2205.10536",
        evidence="release",
        objective=objective(
            soft_weight=0.0, hard_weight=1.0, temperature=4.0, terms={"dist": {"weight": 2.0}}
        ),
        note="T = 4 is the release's for CIFAR, 1 for ImageNet; its configuration for CIFAR was not at hand, "
        "so the weight 2 is that of the others. Several teachers are compared as their mixture",
    ),
    "logit-std": Method(
        formula="9 T² KL(sum_k w_k softmax(Z(z_k) / T) || softmax(Z(z) / T)) + 0.1 CE, T = 2, "
        "Z(z) = (z - mean) / std",
        source="Sun et al. 2024, arXiv 2403.01427 (logit standardization)",
        evidence="release",
        objective=objective(soft_weight=9.0, hard_weight=0.1, temperature=2.0, standardize=True),
        note="the release takes T = 3 for some pairs. objective.standardize=true does the same to other "
        "methods on logits; the release's options for DKD make alpha 9 and beta 81 and leave T at 4",
    ),
    "tf-kd": Method(
        formula="0.9 CE + 0.1 KL(v_T || q_T), T = 20, v = 0.99 for y and 0.01 / (C - 1) for each other class",
        source="Yuan et al. 2020, arXiv 1909.11723, equations 8 and 9",
        evidence="paper",
        objective=objective(hard_weight=0.9, terms={"virtual_teacher": {"weight": 0.1}}),
        note="no teacher, and no T²: the term's gradient is 1 / T² of what it would be in kd. Values are "
        "those for ImageNet. The release softens probabilities by a second softmax and not the student "
        "(terms.virtual_teacher.softening=double_softmax), and averages over classes: weight a M / C for its "
        "a and M",
    ),
    "tf-kd-self": Method(
        formula="0.05 CE + 0.95 KL(P || q), T = 20, P of the same network, trained before",
        source="Yuan et al. 2020, arXiv 1909.11723, equation 7; values of its release",
        evidence="paper",
        objective=objective(soft_weight=_TFKD_SELF, hard_weight=0.05, temperature=20.0),
        note="soft_weight is 0.95 / T², since the paper has no T²: with another temperature set both. The "
        "release has T², averages over classes, and multiplies by M of 1, 50 or 100: soft_weight 0.95 M / C",
    ),
    "annealing-kd": Method(
        formula="mean_c (z - Phi z_k)² for 30 epochs, Phi = 1 - (T - 1) / 10, T from 10 down to 1; then CE",
        source="Jafari et al. 2021 (Annealing-KD), arXiv 2104.07163; T_max of its script for CIFAR",
        evidence="re-implementation",
        objective=objective(
            hard_weight=_step(0.0, 1.0),
            terms={"annealed_logits": {"weight": _step(_ANNEALED, 0.0), "epochs": _ANNEALING_EPOCHS}},
        ),
        note="the script has 200 epochs and 100 on labels: change terms.annealed_logits.epochs and the "
        "epochs of both weights together. One optimizer and one learning-rate schedule for both phases; "
        "there the second begins with new ones, from the first one's best weights. The squared norm of the "
        "paper is weight C. Several teachers are compared as the mean of their logits. Stores are read in "
        "both phases",
    ),
    "label-refinery": Method(
        formula="KL(P || q), T = 1, no labels",
        source="Bagherinezhad et al. 2018, arXiv 1805.02641",
        evidence="release",
        objective=objective(soft_weight=1.0, hard_weight=0.0, temperature=1.0),
        note="the release has the cross-entropy to P, which is larger by P's entropy. Its labels are the "
        "refiner's for the student's own crop, which is what a store's view holds",
    ),
    "born-again": Method(
        formula="KL(P || q), T = 1, no labels, P of the generation before, a network like the student",
        source=f"{_BORN_AGAIN}, BAN; BAN+L with labels",
        evidence="paper",
        objective=objective(soft_weight=1.0, hard_weight=0.0, temperature=1.0),
        note="each generation is the teacher of the next, with a new seed. hard_weight=1 adds the labels "
        "(BAN+L), whose share the paper does not state. Stores of all generations together are its ensemble",
    ),
    "born-again-cwtm": Method(
        formula="sum_n w_n CE(z_n, y_n) / sum_n w_n, w = max P, T = 1",
        source=f"{_BORN_AGAIN}, CWTM (confidence weighted by teacher max)",
        evidence="re-implementation",
        objective=objective(soft_weight=0.0, hard_weight=0.0, temperature=1.0, terms={"confident_label": {}}),
        note="the paper's equations were not at hand, and whether its sum is divided by the batch size as "
        "well is not clear. The teacher's classes are not learned from, only how sure it is",
    ),
    "born-again-dkpp": Method(
        formula="KL(phi(P) || q), T = 1, no labels, phi permutes all classes but the top one",
        source=f"{_BORN_AGAIN}, DKPP (dark knowledge with permuted predictions)",
        evidence="re-implementation",
        objective=objective(soft_weight=0.0, hard_weight=0.0, temperature=1.0, terms={"permuted": {}}),
        note="the paper's equations were not at hand. Permutations are drawn anew in every epoch",
    ),
}
