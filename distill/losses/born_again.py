"""Born-again networks that learn from one part of the teacher's output: its confidence, or its top class.

Furlanello et al., ICML 2018, arXiv 1805.04770, section 3. `confident_label` (CWTM) keeps the teacher's
largest probability, as the weight of a sample's label. `permuted` (DKPP) keeps the teacher's top class with
its probability, and permutes the probabilities of the others, which then tell nothing about single classes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from coursepack.data.randomness import Purpose, Samples, random_words
from coursepack.device import to_device
from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.distill.losses.label import cross_entropy
from coursepack.errors import RecipeError


class ConfidentLabelConfig(TermConfig):
    """Config of the cross-entropy weighted by the teacher's confidence."""

    term: Literal["confident_label"] = "confident_label"


class ConfidentLabel(nn.Module):
    """Cross-entropy to the labels, each sample weighted by the teacher's largest probability."""

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)` in nats, with gradient to the student's logits.

        The weights sum to N over the batch, so that the mean is the paper's sum.
        """
        confidence = inputs.soft.probs.amax(1).float()
        weights = confidence * (len(confidence) / confidence.sum())
        return weights * cross_entropy(inputs.student.logits, inputs.labels)


class PermutedConfig(TermConfig):
    """Config of the divergence from the permuted teacher."""

    term: Literal["permuted"] = "permuted"


class Permuted(nn.Module):
    """Divergence from the teacher with the probabilities of all classes but the top one permuted."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return `T² KL(permuted P || q)` `(N,)` in nats, with gradient to the student's logits.

        Permutations are drawn from (seed, sample, epoch).
        """
        if inputs.samples is None:
            raise RecipeError(
                "term 'permuted' draws a permutation for each sample, but LossInputs.samples is None: pass "
                "the indices of the batch's samples"
            )
        soft = inputs.soft
        probs = permuted_probs(soft.probs.float(), self.seed, inputs.samples, inputs.step.epoch)
        temperature = soft.temperature
        column = temperature[:, None] if isinstance(temperature, Tensor) else temperature
        log_q = (soft.comparable(inputs.student.logits).float() / column).log_softmax(1)
        divergence: Tensor = temperature**2 * (torch.xlogy(probs, probs) - probs * log_q).sum(1)
        return divergence


def permuted_probs(probs: Tensor, seed: int, samples: Samples, epoch: int) -> Tensor:
    """Return probabilities `(N, C)` with those of all classes but the top one permuted in each row."""
    classes = probs.shape[1]
    words = random_words(seed, samples, epoch, Purpose.PERMUTATION, -(-classes // 4))
    order = to_device(np.argsort(words[:, : classes - 1], axis=1, kind="stable"), probs.device)
    top = probs.argmax(1, keepdim=True)
    others = torch.arange(classes - 1, device=probs.device).expand(len(probs), -1)
    others = others + (others >= top)
    return probs.scatter(1, others, probs.gather(1, others.gather(1, order)))


def _confident_needs(config: ConfidentLabelConfig) -> Needs:
    return Needs(fused=True, labels=True, whole_batch=(config.term,))


def _build_confident(_config: ConfidentLabelConfig, _context: BuildContext) -> ConfidentLabel:
    return ConfidentLabel()


def _permuted_needs(_config: PermutedConfig) -> Needs:
    return Needs(fused=True)


def _build_permuted(_config: PermutedConfig, context: BuildContext) -> Permuted:
    return Permuted(context.seed)


CONFIDENT_LABEL = Loss(
    config=ConfidentLabelConfig,
    formula="N w_n / (sum_m w_m) CE(z_n, y_n), w_n = max_c P_nc",
    source="Furlanello et al. 2018, arXiv 1805.04770, CWTM",
    needs=_confident_needs,
    build=_build_confident,
)
PERMUTED = Loss(
    config=PermutedConfig,
    formula="T² KL(phi(P) || q), phi permutes all classes but the top one",
    source="Furlanello et al. 2018, arXiv 1805.04770, DKPP",
    needs=_permuted_needs,
    build=_build_permuted,
)
