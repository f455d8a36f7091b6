"""Unification of teachers that know different classes: one distribution over all classes from several.

A teacher that knows the classes L_k states the probabilities P_k of these classes, given that one of them is
right. Vongkulbhisal, Vinayavekhin and Visentini-Scarzanella 2019 (Unifying heterogeneous classifiers with
distillation, CVPR, arXiv 1904.06062) look, for each sample, for the distribution u over all classes that
agrees best with all of them.

Teachers whose classes are linked by no common class leave the probability between them open, and are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.distill.fusion.class_sets import ClassSets, linked_teachers
from coursepack.distill.fusion.unify_logits import logit_factorization
from coursepack.distill.fusion.unify_probs import cross_entropy, factorization, mean
from coursepack.errors import RecipeError
from coursepack.kernels import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coursepack.distill.losses.base import BuildContext, LossInputs
    from coursepack.kernels import Rows

Form = Literal["cross_entropy", "factorization", "logit_factorization", "mean"]


class UnifyConfig(FusionConfig):
    """Config of the unification of teachers that know different classes."""

    name: Literal["unify"] = "unify"
    form: Form = "cross_entropy"
    """`cross_entropy`: the u with the least sum of cross-entropies of all P_k to u among the teacher's
    classes. `factorization`: the u with the least squared error of P_k = v_k u on these classes, with any
    v_k. `logit_factorization`: the softmax of the u with the least squared error of log P_k = v_k u + c_k on
    these classes, with any v_k >= 0 and c_k. `mean`: the mean of P_k over the teachers that know a class,
    normalized."""
    iterations: Annotated[int, Field(ge=1)] = 20
    """Maximum number of steps of all forms but `mean`."""
    ridge: Annotated[float, Field(gt=0)] = 0.01
    """Weight of the squared distances of v from one and of u from the best u for v = 1 in
    `logit_factorization`; a large one keeps v at one."""

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
        one = len(parts) == 1
        scores = log_probs[0] if one else FORMS[self.config.form](sets, log_probs, self.config)
        unified = temperature * scores.log_softmax(1)
        exact = all(isinstance(each, Tensor) and each.dtype == torch.float64 for each in logits)
        return unified if exact else unified.float()


def _wide(logits: Tensor | Rows, temperature: float) -> Tensor:
    if not isinstance(logits, Tensor):
        device = logits.device
        logits = decode(logits, torch.full((logits.shape[0],), temperature, device=device))
    return logits.detach().to(torch.float32 if logits.device.type == "mps" else torch.float64)


FORMS: dict[Form, Callable[[ClassSets, Tensor, UnifyConfig], Tensor]] = {
    "cross_entropy": lambda sets, log_probs, config: cross_entropy(sets, log_probs, config.iterations),
    "factorization": lambda sets, log_probs, config: factorization(sets, log_probs, config.iterations),
    "logit_factorization": lambda sets, log_probs, config: logit_factorization(
        sets, log_probs, config.iterations, config.ridge
    ),
    "mean": lambda sets, log_probs, _config: mean(sets, log_probs),
}
"""Functions that return log u `(N, C)` up to a constant for log-probs `(K, N, C)`, minus infinity for unknown
classes, and the config."""


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
