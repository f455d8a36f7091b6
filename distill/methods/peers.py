"""Methods of students that learn from each other."""

from __future__ import annotations

from typing import Any

from coursepack.distill.methods.base import KD, Method, objective

_RAMP: dict[str, Any] = {"shape": "ramp", "epochs": 80}
"""exp(-5 (1 - epoch / 80)²), as in the releases of ONE, OKDDip and FFL; it starts at 0.007, not at 0."""
_MUTUAL: dict[str, Any] = {"temperature": 3.0, "weight": _RAMP}

PEERS: dict[str, Method] = {
    "dml": Method(
        formula="CE + 1/(M-1) sum_{j != i} KL(p_j || p_i), T = 1, for each student i of M",
        source="Zhang, Xiang, Hospedales and Lu 2018 (DML), arXiv 1706.00384, equations 5 to 7",
        evidence="paper",
        objective=objective(terms={"mutual": {}}),
        note="all students are updated from the same outputs; the paper's algorithm 1 updates one after "
        "another (exchange.order=sequential). The official code sums over peers instead of averaging "
        "(terms.mutual.reduction=sum)",
    ),
    "kdcl": Method(
        formula="CE + T² KL(p_t || p_i), T = 2, p_t of the student with the smallest CE (exchange.target: "
        "linear, min_logit, general)",
        source="Guo et al. 2020 (KDCL), CVPR 2020, section 3",
        evidence="recalled",
        objective=objective(
            exchange={"name": "collaborative"}, terms={"mutual": {"temperature": 2.0, "weight": 1.0}}
        ),
        note="formulas from notes and code by others: the paper's text was not at hand, and which target it "
        "found best on CIFAR-100 is disputed. Targets are detached. In the paper each student sees an "
        "augmentation of its own, here all see the same view; the weights of `general`, from held-out "
        "samples there, are those of the training samples in the epoch before, and combine logits",
    ),
    "okddip": Method(
        formula="CE + r(epoch) T² KL(t_i || p_i), T = 3, t_i = sum_j a_ij z_j over the peers; the student "
        "follows the peers' mean",
        source="Chen et al. 2020 (OKDDip), arXiv 1912.00350, and its release",
        evidence="release",
        objective=objective(exchange={"name": "attention"}, terms={"mutual": _MUTUAL}),
        note="the paper's m = 4 is one student and three peers (--peers 4). r is a ramp over 80 epochs. "
        "Targets are not detached, as in the release (exchange.gradient=attention detaches the logits in "
        "them). The release's branches share their first layers; here they are whole networks, as in the "
        "paper's network-based setting",
    ),
    "one": Method(
        formula="CE + r(epoch) T² KL(p_e || p_i) + CE(z_e), T = 3, z_e = sum_i g_i z_i",
        source="Lan, Zhu and Gong 2018 (ONE), arXiv 1806.04606, and its release",
        evidence="release",
        objective=objective(exchange={"name": "gate"}, terms={"mutual": _MUTUAL}),
        note="r is a ramp over 80 epochs. In the paper the students are branches of one network and the gate "
        "reads the layer before they part; here they are whole networks, and it reads all their embeddings",
    ),
    "ffl": Method(
        formula="CE + r(epoch) T² KL(p_f || p_i) + CE(z_f) + r(epoch) T² KL(p_mean || p_f), T = 3, z_f of a "
        "classifier on all students' last maps",
        source="Kim, Hyun, Chung and Kwak 2020 (FFL), arXiv 1904.09058, and its release",
        evidence="release",
        objective=objective(exchange={"name": "feature_fusion", "weight": _RAMP}, terms={"mutual": _MUTUAL}),
        note="r is a ramp over 80 epochs. p_mean is of the mean of the students' logits. The release has two "
        "sub-networks that may share their first layers; here they are whole networks, two or more",
    ),
    "afd": Method(
        formula="CE + T² KL(p_{i-1} || p_i), then in a step of its own (1 - D_i(f_i))²; D_i tells f_{i-1} "
        "from f_i",
        source="Chung, Park, Kim and Kwak 2020 (AFD), arXiv 2002.01775",
        evidence="paper",
        objective=objective(
            exchange={"name": "discriminators"}, terms={"mutual": {"temperature": KD["temperature"]}}
        ),
        note="losses and weights are the paper's equations. T, the discriminators and the learning rate of "
        "the adversarial step (a tenth) are ours: of the paper only the equations were at hand, and no "
        "official code was found. Logits are detached",
    ),
    "let": Method(
        formula="student: KL(p_t || p_s); teacher, updated first: 0.6 CE + 0.4 KL(p_s || p_t), T = 1",
        source="Shi et al. 2021 (ProKT, first called LET), arXiv 2107.09305, and its release for text",
        evidence="release",
        objective=objective(
            hard_weight=0.0,
            exchange={"name": "outputs", "order": "sequential", "mode": "eval", "peer_lr_factor": 0.3},
            terms={"mutual": {}},
            peers={"hard_weight": 0.6, "terms": {"mutual": {"weight": 0.4}}},
        ),
        note="the peer is the teacher; let it start from a run or a store with --student run:FOLDER or "
        "--student store:PATH after the student's own. lambda = 0.4 and the rates' ratio of 0.3 are those "
        "of the release for text, with AdamW; the paper's numbers for images were not found. Targets are "
        "from eval mode, as in the release",
    ),
    "codistillation": Method(
        formula="CE + 1/(M-1) sum_{j != i} KL(p_j || p_i), T = 1, p_j of weights of student j that are up to "
        "50 steps old; every student reads samples of its own",
        source="Anil, Pereyra, Passos, Ormandi, Dahl and Hinton 2018, arXiv 1804.03235; formula as given by "
        "Sodhani et al. 2020, arXiv 2010.02838, algorithm 1",
        evidence="re-implementation",
        objective=objective(terms={"mutual": {}}, exchange={"name": "stale"}),
        note="whether the paper averages divergences or predictions, its weight and its burn-in are not "
        "known: weight 1 and burn-in 0 as in the release of SC20 (pfnet-research), whose divergence is "
        "KL(p_i || p_j) (terms.mutual.divergence=reverse_kl) and whose peers keep the mode of training",
    ),
}
