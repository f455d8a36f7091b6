"""The fused multi-teacher soft-target loss, its mixture, and the choice of path."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coursepack.kernels import analytic, compile_op, dispatch
from coursepack.kernels.autograd import Evaluate, SoftTargetLoss
from coursepack.kernels.cpu import native
from coursepack.kernels.reference import teacher_probs
from coursepack.kernels.spec import LossSpec, Teachers, check_call, reduced
from coursepack.kernels.values import check_values, full_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.kernels.dispatch import Choice
    from coursepack.kernels.labels import MixedLabels


def soft_target_loss(
    student_logits: Tensor,
    teachers: Teachers,
    labels: Tensor | MixedLabels | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: Tensor | Sequence[float] | None = None,
    adjustment: str | Sequence[str] = "none",
    smoothing: float = 0.1,
    divergence: str = "kl",
    combine: str = "mixture",
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
) -> Tensor:
    """Distillation loss of each sample: `row_weight (soft_weight T² D + hard_weight CE)`.

    D compares the teachers' softened probabilities with the student's, q = softmax(z / T). The factor T²
    (Hinton et al. 2015, section 2) is applied here, per sample, and nowhere else.

    Args:
        student_logits: `(N, C)` float32, bfloat16 or float16; receives the gradient. With float64 logits the
            loss is computed and returned in float64.
        teachers: `(K, N, C)` logits, or a list of K tensors or encoded rows `(N, C)`; receive no gradient.
        labels: class ids `(N,)` int64, or `MixedLabels`. Needed by `adjustment` and `hard_weight`.
        weights: one per teacher `(K,)`, or per sample and teacher `(N, K)`; None means 1/K. Not negative;
            they need not sum to one. May receive a gradient. If every teacher that gives a class any
            probability has weight zero, that gradient is infinite; log p is clamped at the smallest normal
            number instead.
        temperature: T, a number or `(N,)`, 0 < T <= 100; no gradient.
        teacher_temperature: K numbers, or `(K,)` or `(K, N)`; None means `temperature`.
        adjustment: correction of a wrong teacher (its top class is not the label), one name or one per
            teacher: "none"; "shift", swap its probabilities of the label and of its top class, ties to the
            lowest class (KA-PS); "smooth", `(1 - smoothing) onehot + smoothing / C`, not tempered (KA-LSR).
            Both from Wen et al., arXiv 1911.07471. Refused for `MixedLabels`.
        smoothing: epsilon of "smooth", from 0 to 1.
        divergence: "kl", KL(teachers || student); "reverse_kl", KL(student || teachers); "js", the
            Jensen-Shannon divergence; "mse", the mean squared difference of logits over their temperatures
            ("smooth", which has no logits, is refused).
        combine: "mixture", D(sum_k w_k P_k || q); or "sum", sum_k w_k D(P_k || q). The gradient to the
            student is the same; the value and the gradient to the weights are not.
        soft_weight: factor of D.
        hard_weight: factor of the cross-entropy to `labels` at T = 1.
        row_weight: `(N,)`; a row of weight zero gives zero and no gradient, even if it holds NaN.
        ignore_index: label that adds no cross-entropy and leaves the teachers of its row unadjusted.
        reduction: "none"; "mean" over samples, which is torch's `batchmean`; or "sum". On the CPU faster than
            the reduction of `(N,)`.

    Returns:
        `(N,)` float32 in nats, or a scalar. A NaN stays in its own row.

    Raises:
        ValueError: an invalid shape, name or value. Values are checked on the CPU only. On CUDA, and in torch
            operations under `torch.compile`, a row with an invalid value becomes NaN, so that nothing waits
            for the device and the graph is not split.
        TypeError: a tensor of the wrong dtype.
        RuntimeError: a second backward pass (the gradient is computed in the forward pass and used once).

    >>> z = torch.tensor([[2.0, 0.0, -1.0]])
    >>> float(soft_target_loss(z, z[None], temperature=4.0))
    0.0
    """
    # By place, which takes half the time.
    spec = LossSpec(
        weights,
        temperature,
        teacher_temperature,
        adjustment,
        smoothing,
        divergence,
        combine,
        soft_weight,
        hard_weight,
        row_weight,
        ignore_index,
        reduction,
    )
    call = check_call(student_logits, teachers, labels, spec)
    path, _ = dispatch.choose(student_logits, call)
    if path == dispatch.KERNEL:
        return _apply(student_logits, call.wide_weights, partial(native.evaluate, call))
    if path == dispatch.OP:
        return reduced(compile_op.call_op(student_logits, call), reduction)
    values = check_values(call)
    weights = None if call.weights is None else full_weights(call)
    return reduced(_apply(student_logits, weights, partial(analytic.evaluate, values)), reduction)


def describe(
    student_logits: Tensor, teachers: Teachers, labels: Tensor | MixedLabels | None = None, **options: Any
) -> Choice:
    """Describe the path and the threads that `soft_target_loss` would use for the same arguments.

    Nothing is computed. Arguments and errors are those of `soft_target_loss`, except for the values inside
    tensors, which are not checked.

    >>> print(describe(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(1, 2, 3)))
    analytic: computes in float64
    """
    call = check_call(student_logits, teachers, labels, LossSpec(**options))
    return dispatch.describe_call(student_logits, call)


def _apply(student_logits: Tensor, weights: Tensor | None, evaluate: Evaluate) -> Tensor:
    loss: Tensor = SoftTargetLoss.apply(student_logits, weights, evaluate)
    return loss


def soft_targets(
    teachers: Teachers,
    labels: Tensor | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: Tensor | Sequence[float] | None = None,
    adjustment: str | Sequence[str] = "none",
    smoothing: float = 0.1,
    ignore_index: int = -100,
) -> Tensor:
    """Compute the mixture `sum_k w_k P_k` `(N, C)` that `soft_target_loss` compares the student with.

    float32, or float64 for a float64 tensor of teachers; differentiable in `weights`. Arguments and errors
    are those of `soft_target_loss`.
    """
    spec = LossSpec(
        weights=weights,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        adjustment=adjustment,
        smoothing=smoothing,
        ignore_index=ignore_index,
    )
    double = isinstance(teachers, Tensor) and teachers.dtype == torch.float64
    call = check_call(None, teachers, labels, spec, torch.float64 if double else torch.float32)
    if dispatch.reads_teachers(call):
        return native.mixture(call)
    values = check_values(call)
    wide = full_weights(call).to(call.dtype)
    mixture = wide[:, :1] * teacher_probs(values, 0)
    for k in range(1, call.teacher_count):
        mixture = mixture + wide[:, k, None] * teacher_probs(values, k)
    return mixture
