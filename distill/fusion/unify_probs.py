"""Unified distributions of teachers' probabilities: by cross-entropy, by factorization, and their mean.

The first two problems have one unknown per teacher, the probability of its classes together: u follows from
these in closed form, and Newton's method finds them in a few steps, where a re-implementation takes 3,000
gradient steps over all classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coursepack.distill.fusion.maximize import SMALLEST, Problem, maximize, newton_step

if TYPE_CHECKING:
    from torch import Tensor

    from coursepack.distill.fusion.class_sets import ClassSets


def cross_entropy(sets: ClassSets, log_probs: Tensor, iterations: int) -> Tensor:
    """Return log u `(N, C)` up to a constant, u of the least cross-entropies to log-probs `(K, N, C)`."""
    return _shared(sets, log_probs, maximize(*_cross_entropy(sets, log_probs), iterations))


def factorization(sets: ClassSets, log_probs: Tensor, iterations: int) -> Tensor:
    """Return log u `(N, C)` up to a constant, u of the least squared error of P_k = v_k u."""
    theta = maximize(*_factorization(sets, log_probs), iterations)
    above = (log_probs + theta.T[:, :, None]).logsumexp(0)
    return above - (2 * _of_groups(sets, theta)).logsumexp(2)[:, sets.group]


def mean(sets: ClassSets, log_probs: Tensor) -> Tensor:
    """Return the log `(N, C)` of the mean over the teachers that know a class."""
    return _shared(sets, log_probs, log_probs.new_zeros(log_probs.shape[1], len(log_probs)))


def _shared(sets: ClassSets, log_probs: Tensor, theta: Tensor) -> Tensor:
    """Return the log `(N, C)` of sum_k P_k / sum_{k knows the class} exp(theta_k)."""
    return log_probs.logsumexp(0) - _of_groups(sets, theta).logsumexp(2)[:, sets.group]


def _of_groups(sets: ClassSets, theta: Tensor) -> Tensor:
    """Return theta `(N, groups, K)` of the teachers that know each group, minus infinity for the others."""
    return theta[:, None, :].masked_fill(~sets.all_members, -torch.inf)


def _group_sums(sets: ClassSets, log_probs: Tensor) -> Tensor:
    """Return log sum_g P_k `(N, G, K)` of each group of classes that several teachers know."""
    return torch.stack([log_probs[:, :, group].logsumexp(2).T for group in sets.groups], 1)


def _start(sets: ClassSets, log_sums: Tensor) -> Tensor:
    """Return a first theta `(N, K)`, which is exact for teachers that agree.

    theta_i - theta_j is then log P_i - log P_j of the classes that both know; the differences of all pairs
    are met as well as possible, with less weight where these classes have low probabilities.
    """
    both = sets.members[:, :, None] & sets.members[:, None, :]
    shared = log_sums[..., None].masked_fill(~both, -torch.inf).logsumexp(1)
    mean = (shared + shared.transpose(1, 2)) / 2
    others = ~torch.eye(len(both[0]), dtype=torch.bool, device=both.device)
    linked = both.any(0) & others
    weights = ((mean - mean.masked_fill(~linked, -torch.inf).amax((1, 2), keepdim=True)) / 2).exp()
    weights = weights.masked_fill(~linked, 0.0)
    differences = (shared - shared.transpose(1, 2)).masked_fill(~linked, 0.0)
    start = newton_step((weights * differences).sum(2), torch.diag_embed(weights.sum(2)) - weights)
    return torch.where(start.isfinite().all(1, keepdim=True), start, 0.0)


def _cross_entropy(sets: ClassSets, log_probs: Tensor) -> tuple[Problem, Tensor]:
    """Return the dual of min_u -sum_k sum_{L_k} P_k log(u / sum_{L_k} u), and a first theta.

    With a = sum_k P_k, the minimum has u = a / sum_{k knows the class} exp(theta_k), and theta maximizes
    sum_k s_k theta_k - sum_g a_g log sum_{k in g} exp(theta_k): g are the groups of classes that the same
    teachers know, a_g the sum of a in one, s_k that of P_k in all groups of several teachers. It is concave.
    The safe step is that of Hunter 2004 for the same likelihood (MM algorithms for generalized Bradley-Terry
    models, section 4).
    """
    log_sums = _group_sums(sets, log_probs)
    of_teachers = (log_sums - log_sums.amax((1, 2), keepdim=True)).exp()
    sums, outside = of_teachers.sum(2), ~sets.members
    share = of_teachers.sum(1).clamp_min(SMALLEST)

    def of_groups(theta: Tensor) -> Tensor:
        return theta[:, None, :].masked_fill(outside, -torch.inf)

    def parts(theta: Tensor) -> Tensor:
        return sums[:, :, None] * of_groups(theta).softmax(2)

    def value(theta: Tensor) -> Tensor:
        return (share * theta).sum(1) - (sums * of_groups(theta).logsumexp(2)).sum(1)

    def slopes(theta: Tensor) -> tuple[Tensor, Tensor]:
        part = parts(theta)
        total = part.sum(1)
        both = torch.einsum("ngk,ngj->nkj", part / sums[:, :, None].clamp_min(SMALLEST), part)
        return share - total, torch.diag_embed(total) - both

    def safe_step(theta: Tensor) -> Tensor:
        return theta + (share / parts(theta).sum(1).clamp_min(SMALLEST)).log()

    return Problem(value, slopes, safe_step), _start(sets, log_sums)


def _factorization(sets: ClassSets, log_probs: Tensor) -> tuple[Problem, Tensor]:
    """Return the problem of min_{u, v} sum_k sum_{L_k} (P_k - v_k u)² without u, and a first theta = log v.

    For given v the best u is sum_k P_k v_k / sum_k v_k² over the teachers that know the class, which leaves
    max_v sum_g v' S_g v / sum_{k in g} v_k², with S_g the sum of P P' over the classes of group g. The safe
    step is that of alternating least squares. u and v are positive without a constraint, since P is.
    """
    log_sums, members = _group_sums(sets, log_probs), sets.members.to(log_probs.dtype)
    scale = log_sums.amax((1, 2))[:, None]
    probs = [(log_probs[:, :, group] - scale).exp() for group in sets.groups]
    grams = torch.stack([torch.einsum("knc,jnc->nkj", of_group, of_group) for of_group in probs], 1)

    def sums(theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return v, v_k (S_g v)_k, v' S_g v and sum_{k in g} v_k²."""
        v = (theta - theta.amax(1, keepdim=True)).exp()
        products = torch.einsum("ngkj,nj->ngk", grams, v) * v[:, None, :]
        below = torch.einsum("gk,nk->ng", members, v.square()).clamp_min(SMALLEST)
        return v, products, products.sum(2), below

    def value(theta: Tensor) -> Tensor:
        _, _, above, below = sums(theta)
        return (above / below).sum(1)

    def slopes(theta: Tensor) -> tuple[Tensor, Tensor]:
        v, products, above, below = sums(theta)
        ratio, squares = (above / below)[..., None], members * v.square()[:, None, :]
        first = 2 * (products - ratio * squares) / below[..., None]
        cross = first[..., :, None] * (2 * squares)[..., None, :]
        second = 2 * grams * (v[:, None, :, None] * v[:, None, None, :]) - cross - cross.transpose(2, 3)
        second = second + torch.diag_embed(2 * products - 4 * ratio * squares)
        return first.sum(1), -(second / below[..., None, None]).sum(1)

    def safe_step(theta: Tensor) -> Tensor:
        v, products, above, below = sums(theta)
        upper = (products / below[..., None]).sum(1) / v.clamp_min(SMALLEST)
        lower = torch.einsum("gk,ng->nk", members, above / below.square())
        return (upper.clamp_min(SMALLEST) / lower.clamp_min(SMALLEST)).log()

    return Problem(value, slopes, safe_step), _start(sets, log_sums)
