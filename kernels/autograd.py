"""Autograd Function around every eager path: gradients are computed in the forward pass and used once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Evaluate = Callable[[Tensor, Tensor | None, bool, bool], tuple[Tensor, Tensor | None, Tensor | None]]
"""Function of student logits, weights and a flag for each gradient. Returns the loss, `(N,)` or on the CPU a
scalar, and its gradients with respect to student logits and weights."""

Gradients = tuple[Tensor | None, Tensor | None, None]
"""Gradients with respect to student logits, weights, and what has none."""

USED_TWICE = (
    "soft_target_loss keeps its gradient for one backward pass only: call it again for a second backward"
)


class SoftTargetLoss(torch.autograd.Function):
    """Autograd Function that stores the gradients from `evaluate` and scales them in place in backward."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, weights: Tensor | None, evaluate: Evaluate) -> Tensor:
        """Compute the loss."""
        wants_student, wants_weights = ctx.needs_input_grad[:2]
        loss, *ctx.gradients = evaluate(student_logits, weights, wants_student, wants_weights)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Gradients:
        """Return the gradients with respect to student logits `(N, C)` and weights `(N, K)`.

        Raises:
            RuntimeError: a second backward pass.
        """
        # Marked as not differentiable only where that counts: it would take as long as all else here.
        return _marked_gradients(ctx, grad_loss) if torch.is_grad_enabled() else _gradients(ctx, grad_loss)


def _gradients(ctx: Any, grad_loss: Tensor) -> Gradients:
    if ctx.gradients is None:
        raise RuntimeError(USED_TWICE)
    gradients, ctx.gradients = ctx.gradients, None
    # The common factor of a mean, 1, saves a pass over the gradient.
    if grad_loss.ndim > 0 or grad_loss.item() != 1:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_loss.unsqueeze(-1))
    return gradients[0], gradients[1], None


_marked_gradients = once_differentiable(_gradients)
