"""Methods that read the logits of one teacher, or of several with fixed weights."""

from __future__ import annotations

from typing import Any

from coursepack.distill.methods.base import KD, Method, objective

_FLSW: dict[str, Any] = {"kind": "flsw", "slope": 40.0, "gamma": 0.5}
_WEN = "Wen, Lai and Qian 2019, arXiv 1911.07471"

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
}
