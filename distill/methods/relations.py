"""Methods that compare relations and statistics of features.

Each adds a term to cross-entropy of weight 1, without soft targets. Weights are those of RepDistiller (Tian
et al. 2020), whose losses are the same means: over samples and positions (`at`), samples and channels
(`fsp`), samples (`nst`), or pairs of samples (`sp`, `pkt`, `rkd`, and `cc`, whose numbers are KD-Zoo's).
"""

from __future__ import annotations

from typing import Any

from coursepack.distill.methods.base import Method, objective


def _with_labels(**terms: dict[str, Any]) -> Any:
    return objective(soft_weight=0.0, hard_weight=1.0, terms=terms)


_LAST = "the last block of teacher and student by default"
RELATIONS: dict[str, Method] = {
    "at": Method(
        formula="CE + 1000 sum_l mean_hw (Q_l - Q_kl)², Q = A / ||A||, A = mean_c f_c²",
        source="Zagoruyko and Komodakis 2017, arXiv 1612.03928, section 3.1; weight of the authors' code",
        objective=_with_labels(at={"weight": 1000.0}),
        evidence="release",
        note="the authors' code takes the mean of squares, equation 2 the norm (terms.at.distance=norm). "
        "Compares every block; the releases leave out the stem (terms.at.layers)",
    ),
    "sp": Method(
        formula="CE + 3000 ||G - G_k||² / N², G = rows of f f' divided by their norm",
        source="Tung and Mori 2019, arXiv 1907.09682, equation 4; weight of Tian et al. 2020",
        objective=_with_labels(sp={"weight": 3000.0}),
        evidence="re-implementation",
        note=f"compares maps with all their positions, of {_LAST}",
    ),
    "rkd": Method(
        formula="CE + 25 mean_ij SmoothL1(d_ij - d_kij) + 50 mean_ijk SmoothL1(cos_ijk - cos_kijk) of "
        "embeddings, distances divided by their mean",
        source="Park et al. 2019, arXiv 1904.05068, equations 5 to 8; weights of Tian et al. 2020",
        objective=_with_labels(
            distance={"compare": "features", "weight": 25.0}, angle={"compare": "features", "weight": 50.0}
        ),
        evidence="release",
        note=f"embeddings are the means over positions of {_LAST}. The mean distance counts all pairs of "
        "different samples, as in the authors' code, whose weights for metric learning are 1 and 2",
    ),
    "pkt": Method(
        formula="CE + 30000 mean_ij p_ij log((p_ij + eps) / (q_ij + eps)), rows of (1 + cos) / 2 divided by "
        "their sums",
        source="Passalis and Tefas 2018, arXiv 1803.10837; weight of Tian et al. 2020",
        objective=_with_labels(pkt={"weight": 30000.0}),
        evidence="release",
        note="a mean over N² pairs, N times smaller than the divergence that sums over a row. Embeddings are "
        f"the means over positions of {_LAST}",
    ),
    "cc": Method(
        formula="CE + 100 mean_ij (K_ij - K_kij)², K = exp(-0.8) (1 + 0.8 cos + 0.32 cos²)",
        source="Peng et al. 2019, arXiv 1904.01802; numbers of AberHu/Knowledge-Distillation-Zoo",
        objective=_with_labels(cc={"weight": 100.0}),
        evidence="re-implementation",
        note="the paper's text was not available: weight, gamma and order are those of a re-implementation "
        "for CIFAR-10, and the learned layer before the kernel is left out. RepDistiller's loss of this name "
        f"compares neighbors in the batch alone. Embeddings are the means over positions of {_LAST}",
    ),
    "nst": Method(
        formula="CE + 50 ||G - G_k||², G = mean_c f_c f_c', each channel f_c of unit length over positions",
        source="Huang and Wang 2017, arXiv 1707.01219, equation 5; weight of Tian et al. 2020",
        objective=_with_labels(nst={"weight": 50.0}),
        evidence="re-implementation",
        note=f"the kernel is (x . y)². Compares {_LAST}; RepDistiller compares every block",
    ),
    "fsp": Method(
        formula="CE + 50 sum_l mean_ij (F_l - F_kl)_ij², F = mean_hw f1_i f2_j",
        source="Yim et al. 2017, CVPR, equations 1 and 2; weight of Tian et al. 2020",
        objective=_with_labels(fsp={"weight": 50.0}),
        evidence="re-implementation",
        note="every two consecutive blocks by default, with the teacher's numbers of channels. The paper "
        "trains the flows first and the labels after them; here both are trained together",
    ),
}
"""Methods by name."""
