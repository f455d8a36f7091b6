"""How well a network does on a source, without augmentation."""

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
    """Accuracy (top-1, and top-5 where there are more than five classes), NLL in nats, calibration error.

    Images are seen under `evaluation_view`; `renderer` renders them ahead. Computed in float32; sums stay on
    the device until the last batch is asked for, so that no batch waits for the one before. Of several ranks
    each looks at its share of every batch, and all are told the facts of the whole.
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
    several = (batch for batch in of_all if len(batch))
    for batch in several if renderer is None else renderer.ahead(several):
        logits, labels = module(network_input(batch, network.preprocessing)).float(), batch.main_labels
        found = [(logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")]
        if "accuracy_top5" in names:
            found.append(top5_correct(logits, labels))
        sums += torch.stack([value.double() for value in found])
        calibration.add(logits, labels)
        if meter is not None:
            meter.advance(len(batch))
    module.train(was_training)
    ranks.summed(sums)
    ranks.summed(calibration.sums)
    values = {name: value / len(samples) for name, value in zip(names, sums.tolist(), strict=True)}
    return {**values, "calibration_error": calibration.error()}


def evaluation_view(source: Source) -> ViewRecipe:
    """How a source is looked at without augmentation: small images whole, image files cut to their middle."""
    return PRESETS["none"] if source.whole is not None else PRESETS["eval"]
