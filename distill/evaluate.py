"""How well a network does on a source, without augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from coursepack.data import PRESETS, batches
from coursepack.distill.epoch_log import Calibration, top5_correct

if TYPE_CHECKING:
    from coursepack.console import Meter
    from coursepack.data import Source, ViewRecipe
    from coursepack.data.loading import Renderer
    from coursepack.distill.learner import Learner

BATCH_SIZE = 512


@torch.inference_mode()
def evaluate(
    learner: Learner,
    source: Source,
    device: torch.device,
    *,
    renderer: Renderer | None = None,
    meter: Meter | None = None,
) -> dict[str, float]:
    """Accuracy (top-1, and top-5 where there are more than five classes), NLL in nats, calibration error.

    Images are seen under `evaluation_view`; `renderer` renders them ahead.
    """
    was_training = learner.training
    learner.eval()
    samples = np.arange(len(source.labels))
    sums = {"accuracy": 0.0, "nll": 0.0}
    if len(source.class_names) > 5:
        sums["accuracy_top5"] = 0.0
    calibration = Calibration(device)
    recipe = evaluation_view(source)
    several = batches(source, recipe, samples, views=[0], batch_size=BATCH_SIZE, device=device)
    for batch in several if renderer is None else renderer.ahead(several):
        logits, labels = learner.predict(batch).float(), batch.main_labels
        sums["accuracy"] += float((logits.argmax(1) == labels).sum())
        sums["nll"] += float(F.cross_entropy(logits, labels, reduction="sum"))
        if "accuracy_top5" in sums:
            sums["accuracy_top5"] += float(top5_correct(logits, labels))
        calibration.add(logits, labels)
        if meter is not None:
            meter.advance(len(batch))
    learner.train(was_training)
    facts = {name: value / len(samples) for name, value in sums.items()}
    return {**facts, "calibration_error": calibration.error()}


def evaluation_view(source: Source) -> ViewRecipe:
    """How a source is looked at without augmentation: small images whole, image files cut to their middle."""
    return PRESETS["none"] if source.whole is not None else PRESETS["eval"]
