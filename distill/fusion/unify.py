"""Unification of teachers that know different classes: one distribution over all classes from several.

A teacher that knows the classes L_k states the probabilities P_k of these classes, given that one of them is
right. Vongkulbhisal, Vinayavekhin and Visentini-Scarzanella 2019 (Unifying heterogeneous classifiers with
distillation, CVPR, arXiv 1904.06062) look, for each sample, for the distribution u over all classes that
agrees best with all of them. The problems have one unknown per teacher, the probability of its classes
together: u follows from these in closed form, and Newton's method finds them in a few steps, where a
re-implementation takes 3,000 gradient steps over all classes.

Teachers whose classes are linked by no common class leave the probability between them open, and are refused.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.errors import RecipeError
from coursepack.kernels import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coursepack.distill.losses.base import BuildContext, LossInputs
    from coursepack.kernels import Rows

TOLERANCE = 1e-6
"""Change of the logarithms of the unknowns in one step at which the CPU stops. Other devices take all steps,
since reading the change would wait for them."""
SLACK = 1e-12
"""Difference of values, relative to them, that may be of rounding."""
SMALLEST = 1e-37
"""Smallest number that is divided by, or whose logarithm is taken."""

Form = Literal["cross_entropy", "factorization", "mean"]


class UnifyConfig(FusionConfig):
    """Config of the unification of teachers that know different classes."""

    name: Literal["unify"] = "unify"
    form: Form = "cross_entropy"
    """`cross_entropy`: the u with the least sum of cross-entropies of all P_k to u among the teacher's
    classes. `factorization`: the u with the least squared error of P_k = v_k u on these classes, with any
    v_k. `mean`: the mean of P_k over the teachers that know a class, normalized."""
    iterations: Annotated[int, Field(ge=1)] = 20
    """Maximum number of steps of `cross_entropy` and `factorization`."""

    def refusal_of_classes(self, known: Sequence[Sequence[int]], classes: int) -> str:
        """Return why teachers that know these classes cannot be unified, or an empty string."""
        unknown = sorted(set(range(classes)).difference(*known))
        if unknown:
            return (
                f"no teacher knows class {', '.join(map(str, unknown[:5]))}"
                f"{', ...' if len(unknown) > 5 else ''} of the source's {classes}: add a teacher that does"
            )
        groups = linked_teachers(known)
        if len(groups) == 1 or self.form == "mean":
            return ""
        shown = " and ".join(", ".join(map(str, group)) for group in groups)
        return (
            f"teachers {shown} (counted from 0) have no class in common, so nothing says how probable the "
            "classes of one are beside those of the other: add a teacher that knows classes of both, or take "
            "their mean, in which they count equally, with --set objective.fusion.form=mean"
        )


def linked_teachers(known: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the groups of teachers that are linked by common classes, directly or through others.

    >>> linked_teachers([(0, 1), (2, 3), (1, 4)])
    [[0, 2], [1]]
    """
    groups: list[tuple[list[int], set[int]]] = []
    for index, classes in enumerate(known):
        linked = [group for group in groups if group[1] & set(classes)]
        groups = [group for group in groups if group not in linked]
        members = sorted(itertools.chain([index], *(group[0] for group in linked)))
        groups.append((members, set(classes).union(*(group[1] for group in linked))))
    return sorted(group[0] for group in groups)


class Problem(NamedTuple):
    """Function of theta `(N, K)` to maximize; adding a constant to a row of theta changes nothing."""

    value: Callable[[Tensor], Tensor]
    """Returns the values `(N,)`."""
    slopes: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Returns the gradient `(N, K)` and the negative Hessian `(N, K, K)`."""
    safe_step: Callable[[Tensor], Tensor]
    """Returns the next theta of a slower method that never lowers the value, and stays at its maximum."""


def maximize(problem: Problem, start: Tensor, iterations: int) -> Tensor:
    """Return theta `(N, K)` of some steps: in each row the best of Newton, safe and extrapolated."""
    theta = start
    for _ in range(iterations):
        once = problem.safe_step(theta)
        twice = problem.safe_step(once)
        new = _best(problem, twice, _extrapolated(theta, once, twice))
        new = _best(problem, new, theta + _newton_step(*problem.slopes(theta)))
        new = torch.where(new.isfinite().all(1, keepdim=True), new - new.mean(1, keepdim=True), theta)
        moved, theta = _moved(theta, new), new
        if theta.device.type == "cpu" and bool((moved <= TOLERANCE).all()):
            break
    return theta


def _best(problem: Problem, one: Tensor, other: Tensor) -> Tensor:
    """Return the rows of higher value; of equal value but for rounding, those that a safe step moves less.

    Classes with low probabilities hardly change the value, but decide how a safe step moves.
    """
    gain, level = problem.value(other) - problem.value(one), problem.value(one).abs()
    calmer = _moved(other, problem.safe_step(other)) <= _moved(one, problem.safe_step(one))
    better = (gain > SLACK * level) | ((gain.abs() <= SLACK * level) & calmer)  # NaN is not
    return torch.where(better[:, None], other, one)


def _extrapolated(theta: Tensor, once: Tensor, twice: Tensor) -> Tensor:
    """Return the extrapolation of two steps (SQUAREM, Varadhan and Roland 2008, third step length)."""
    first, change = once - theta, twice - 2 * once + theta
    norms = [torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (first, change)]
    length = norms[0] / norms[1].clamp_min(SMALLEST)
    extrapolated: Tensor = theta + 2 * length * first + length.square() * change
    return extrapolated


def _newton_step(gradient: Tensor, curvature: Tensor) -> Tensor:
    """Return the solution of curvature x = gradient, for a curvature of constants alone that is zero.

    Unknowns are scaled to curvature one; theirs may differ by orders of magnitude.
    """
    scale = curvature.diagonal(dim1=1, dim2=2).abs().clamp_min(SMALLEST).rsqrt()
    constant = torch.nn.functional.normalize(1 / scale, dim=1)
    scaled = scale[:, :, None] * curvature * scale[:, None, :]
    scaled = scaled + constant[:, :, None] * constant[:, None, :]
    solution: Tensor = torch.linalg.solve_ex(scaled, (scale * gradient)[..., None])[0][..., 0]
    return scale * solution


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Return the largest change `(N,)` of a row of theta, apart from a constant."""
    change = after - before
    return (change - change.mean(1, keepdim=True)).abs().amax(1)


class ClassSets(nn.Module):
    """Classes that each teacher knows, and groups of the classes that the same teachers know."""

    def __init__(self, known: Sequence[Sequence[int]], classes: int) -> None:
        super().__init__()
        knows = np.zeros((classes, len(known)), dtype=np.bool_)
        for index, of_one in enumerate(known):
            knows[list(of_one), index] = True
            self.register_buffer(f"known{index}", torch.tensor(list(of_one)), persistent=False)
        found, inverse = np.unique(knows, axis=0, return_inverse=True)
        members, group = torch.from_numpy(found), torch.from_numpy(inverse.reshape(-1))
        shared = members.sum(1) > 1
        self.group: Tensor
        """Group of each class `(C,)`."""
        self.all_members: Tensor
        """Teachers that know the classes of each group `(groups, K)`."""
        self.members: Tensor
        """The same of the groups that several teachers know, `(G, K)`."""
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("all_members", members, persistent=False)
        self.register_buffer("members", members[shared], persistent=False)
        for number, index in enumerate(shared.nonzero()[:, 0].tolist()):
            self.register_buffer(f"group{number}", (group == index).nonzero()[:, 0], persistent=False)

    @property
    def groups(self) -> list[Tensor]:
        """Classes of each group that several teachers know."""
        return [self.get_buffer(f"group{number}") for number in range(len(self.members))]

    def placed(self, index: int, log_probs: Tensor) -> Tensor:
        """Return a teacher's log-probs `(N, C)`, minus infinity for the classes that it does not know."""
        known = self.get_buffer(f"known{index}")
        everything = log_probs.new_full((len(log_probs), len(self.group)), -torch.inf)
        return everything.index_copy(1, known, log_probs)


class Unify(nn.Module):
    """One row of logits from those of teachers that know different classes."""

    def __init__(self, config: UnifyConfig, known: Sequence[Sequence[int]] = (), classes: int = 0) -> None:
        """Prepare for teachers.

        Args:
            config: the fusion's config.
            known: classes that each teacher knows; empty if all know all.
            classes: number of classes C.

        Raises:
            RecipeError: the teachers cannot be unified.
        """
        super().__init__()
        self.config = config
        if known and (refusal := config.refusal_of_classes(known, classes)):
            raise RecipeError(refusal)
        self.sets = ClassSets(known, classes) if known else None

    def forward(self, _inputs: LossInputs) -> None:
        """Return None: the teachers count equally."""

    @torch.no_grad()
    def unify(self, logits: Sequence[Tensor | Rows], temperature: float) -> Tensor:
        """Return T log u `(N, C)`, finite: logits whose softmax at the temperature is u.

        Args:
            logits: logits of the classes that each teacher knows, `(N, C_k)`.
            temperature: temperature T of P_k and u.
        """
        wide = [_wide(each, temperature) for each in logits]
        classes, device = wide[0].shape[1], wide[0].device
        sets = self.sets or ClassSets([range(classes)] * len(wide), classes).to(device)
        parts = [sets.placed(k, (each / temperature).log_softmax(1)) for k, each in enumerate(wide)]
        log_probs = torch.stack(parts)
        theta = log_probs.new_zeros(log_probs.shape[1], len(wide))
        if len(wide) > 1 and self.config.form != "mean":
            problem, theta = PROBLEMS[self.config.form](sets, log_probs)
            theta = maximize(problem, theta, self.config.iterations)
        unified = temperature * _scores(self.config.form, sets, log_probs, theta).log_softmax(1)
        exact = all(isinstance(each, Tensor) and each.dtype == torch.float64 for each in logits)
        return unified if exact else unified.float()


def _wide(logits: Tensor | Rows, temperature: float) -> Tensor:
    if not isinstance(logits, Tensor):
        device = logits.device
        logits = decode(logits, torch.full((logits.shape[0],), temperature, device=device))
    return logits.detach().to(torch.float32 if logits.device.type == "mps" else torch.float64)


def _scores(form: Form, sets: ClassSets, log_probs: Tensor, theta: Tensor) -> Tensor:
    """Return log u `(N, C)` up to a constant, of log-probs `(K, N, C)` and theta_k, minus log sum_{L_k} u."""
    of_groups = theta[:, None, :].masked_fill(~sets.all_members, -torch.inf)
    if form == "factorization":
        return (log_probs + theta.T[:, :, None]).logsumexp(0) - (2 * of_groups).logsumexp(2)[:, sets.group]
    return log_probs.logsumexp(0) - of_groups.logsumexp(2)[:, sets.group]


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
    start = _newton_step((weights * differences).sum(2), torch.diag_embed(weights.sum(2)) - weights)
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


PROBLEMS: dict[str, Callable[[ClassSets, Tensor], tuple[Problem, Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "factorization": _factorization,
}


def _build(config: UnifyConfig, context: BuildContext) -> Unify:
    return Unify(config, context.known, context.classes)


UNIFY = Fusion(
    config=UnifyConfig,
    formula="one u for all: argmin_u -sum_k sum_{L_k} P_k log(u / sum_{L_k} u), L_k the classes known to k",
    source="Vongkulbhisal, Vinayavekhin and Visentini-Scarzanella 2019 (UHC), arXiv 1904.06062",
    combine="mixture",
    build=_build,
    unifies=True,
)
