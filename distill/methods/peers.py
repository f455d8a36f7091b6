"""Methods of students that learn from each other."""

from __future__ import annotations

from coursepack.distill.methods.base import Method, objective

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
