"""Evaluation of a network on a source without augmentation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coursepack.data import PRESETS, batches
from coursepack.distill.distributed import ALONE
from coursepack.distill.training.learner import network_input
from coursepack.distill.training.metrics import Calibration, top5_correct

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coursepack.console import Meter
    from coursepack.data import Source, ViewRecipe
    from coursepack.data.loading import Renderer
    from coursepack.distill.distributed import Ranks
    from coursepack.models import Network

BATCH_SIZE = 512
Combine = Literal["probs", "logits"]


def evaluate(
    network: Network,
    source: Source,
    device: torch.device,
    *,
    renderer: Renderer | None = None,
    meter: Meter | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Return the accuracy, negative log-likelihood in nats and calibration error of a network on a source.

    Top-5 accuracy is included for more than five classes. Metrics are computed in float32 and accumulated on
    the device, so batches do not wait for each other. With several ranks, each evaluates its share of every
    batch and all return the metrics of the whole source.

    Args:
        network: the network; evaluated in eval mode and restored to its mode.
        source: images and labels, rendered with `evaluation_view`.
        device: device of the network.
        renderer: renders batches ahead in worker processes; None renders in this process.
        meter: progress display.
        ranks: processes that share the evaluation.
    """
    return _evaluate([network], lambda logits: logits[0], source, device, renderer, meter, ranks)


def evaluate_ensemble(
    networks: Sequence[Network],
    source: Source,
    device: torch.device,
    *,
    combine: Combine = "probs",
    renderer: Renderer | None = None,
    meter: Meter | None = None,
) -> dict[str, float]:
    """Return the same metrics as `evaluate` for the average of several networks.

    Args:
        networks: the networks; evaluated in eval mode and restored to their modes.
        source: images and labels.
        device: device of the networks.
        combine: average the probabilities, or the logits.
        renderer: renders batches ahead in worker processes.
        meter: progress display.
    """
    return _evaluate(networks, _COMBINED[combine], source, device, renderer, meter, ALONE)


def mean_probs(logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean probabilities `(N, C)` of several networks' logits."""
    log_probs = torch.stack([each.log_softmax(1) for each in logits])
    return log_probs.logsumexp(0) - math.log(len(logits))


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    """Return the mean `(N, C)` of several networks' logits."""
    return torch.stack(list(logits)).mean(0)


_COMBINED: dict[Combine, Callable[[Sequence[Tensor]], Tensor]] = {
    "probs": mean_probs,
    "logits": mean_logits,
}


@torch.inference_mode()
def _evaluate(
    networks: Sequence[Network],
    combine: Callable[[Sequence[Tensor]], Tensor],
    source: Source,
    device: torch.device,
    renderer: Renderer | None,
    meter: Meter | None,
    ranks: Ranks,
) -> dict[str, float]:
    modules = [network.module for network in networks]
    were_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    samples = np.arange(len(source.labels))
    names = ["accuracy", "nll", *(["accuracy_top5"] if len(source.class_names) > 5 else [])]
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    calibration = Calibration(device)
    recipe = evaluation_view(source)
    of_all = batches(
        source, recipe, samples, views=[0], batch_size=BATCH_SIZE, device=device, part=ranks.part
    )
    nonempty = (batch for batch in of_all if len(batch))
    for batch in nonempty if renderer is None else renderer.ahead(nonempty):
        outputs = [each.module(network_input(batch, each.preprocessing)).float() for each in networks]
        logits, labels = combine(outputs), batch.main_labels
        sums_of_batch = [(logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")]
        if "accuracy_top5" in names:
            sums_of_batch.append(top5_correct(logits, labels))
        sums += torch.stack([value.double() for value in sums_of_batch])
        calibration.add(logits, labels)
        if meter is not None:
            meter.advance(len(batch))
    for module, was_training in zip(modules, were_training, strict=True):
        module.train(was_training)
    ranks.all_reduce_sum(sums)
    ranks.all_reduce_sum(calibration.sums)
    values = {name: value / len(samples) for name, value in zip(names, sums.tolist(), strict=True)}
    return {**values, "calibration_error": calibration.error()}


def evaluation_view(source: Source) -> ViewRecipe:
    """Return the view recipe for evaluation: whole images for small ones, a center crop for image files."""
    return PRESETS["none"] if source.whole is not None else PRESETS["eval"]
