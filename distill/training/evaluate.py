"""Evaluation of a network on a source without augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from coursepack.data import PRESETS, batches
from coursepack.distill.distributed import ALONE
from coursepack.distill.training.learner import network_input
from coursepack.distill.training.metrics import Calibration, top5_correct

if TYPE_CHECKING:
    from coursepack.console import Meter
    from coursepack.data import Source, ViewRecipe
    from coursepack.data.loading import Renderer
    from coursepack.distill.distributed import Ranks
    from coursepack.models import Network

BATCH_SIZE = 512


@torch.inference_mode()
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
    module = network.module
    was_training = module.training
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
        logits, labels = module(network_input(batch, network.preprocessing)).float(), batch.main_labels
        sums_of_batch = [(logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")]
        if "accuracy_top5" in names:
            sums_of_batch.append(top5_correct(logits, labels))
        sums += torch.stack([value.double() for value in sums_of_batch])
        calibration.add(logits, labels)
        if meter is not None:
            meter.advance(len(batch))
    module.train(was_training)
    ranks.all_reduce_sum(sums)
    ranks.all_reduce_sum(calibration.sums)
    values = {name: value / len(samples) for name, value in zip(names, sums.tolist(), strict=True)}
    return {**values, "calibration_error": calibration.error()}


def evaluation_view(source: Source) -> ViewRecipe:
    """Return the view recipe for evaluation: whole images for small ones, a center crop for image files."""
    return PRESETS["none"] if source.whole is not None else PRESETS["eval"]
