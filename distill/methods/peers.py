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
}
