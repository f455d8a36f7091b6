"""Agreement of finished students with each of their teachers, on stored outputs of one view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from coursepack.data import batches
from coursepack.distill.targets.stores import common_views
from coursepack.distill.targets.teacher_stores import open_teacher_stores
from coursepack.distill.training.learner import network_input
from coursepack.errors import CoursepackError, StoreMismatch
from coursepack.kernels import soft_target_loss, soft_targets
from coursepack.models import load_teacher

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coursepack.distill.report.reading import RunGroup, RunLog
    from coursepack.pages.problems import Problems

MAX_SAMPLES = 1024
"""Maximum number of samples, spread evenly over the source."""
BATCH_SIZE = 256


@dataclass(frozen=True)
class Agreement:
    """Comparison of a student with one teacher at temperature 1."""

    teacher: str
    agreement: float
    """Share of samples for which student and teacher predict the same class, among those that the teacher
    knows."""
    kl: float
    """Mean KL(teacher || student) in nats, over the classes that the teacher knows."""
    teacher_accuracy: float
    samples: int


def agreement_of_groups(
    groups: Iterable[RunGroup], device: torch.device, problems: Problems, *, trust_code: bool
) -> dict[int, list[Agreement]]:
    """Return, by index of the group, the agreement of its first run with each of its teachers.

    A student whose stores cannot be read is a problem of the report.
    """
    found = {}
    for group in groups:
        log = group.runs[0]
        if not log.is_finished or log.run.ensemble or not log.run.recipe.stores:
            continue
        try:
            found[group.index] = _agreement(log, group.teacher_names, device, trust_code=trust_code)
        except (CoursepackError, OSError) as error:
            problems.add(f"run {str(log.run.path)!r} was not compared with its teachers: {error}")
    return found


@torch.inference_mode()
def _agreement(log: RunLog, names: list[str], device: torch.device, *, trust_code: bool) -> list[Agreement]:
    recipe = log.run.recipe
    stores = open_teacher_stores(recipe.stores, root=recipe.root, trust_code=trust_code)
    recorded = [store.fingerprint for store in log.provenance.stores]
    for index, reader in enumerate(stores.readers[: len(recorded)]):
        if reader.manifest.fingerprint != recorded[index]:
            raise StoreMismatch(f"store {reader.address!r} is not the one that the run was trained with")
    view = common_views(stores.readers, [()] * len(stores.readers), 1)[0]
    network = load_teacher(f"run:{log.run.path}", stores.source.class_names, trust_code=trust_code)
    network.module.to(device).eval()
    total = len(stores.source.labels)
    samples = np.unique(np.linspace(0, total - 1, min(total, MAX_SAMPLES)).astype(np.int64))
    sums = torch.zeros(len(names), 3, dtype=torch.float64)
    for batch in batches(
        stores.source, stores.view, samples, views=[view], batch_size=BATCH_SIZE, device=device
    ):
        logits = network.module(network_input(batch, network.preprocessing)).float().cpu()
        labels = batch.main_labels.cpu()
        for index, reader in enumerate(stores.readers):
            rows = [reader.rows("logits", batch.view, batch.samples)]
            known = torch.tensor(reader.manifest.known_classes)
            own = logits[:, known]
            top, kl = soft_targets(rows).argmax(1), soft_target_loss(own, rows, reduction="sum")
            same, correct = top == own.argmax(1), known[top] == labels
            sums[index] += torch.stack([same.sum(), kl, correct.sum()]).double()
    return [
        Agreement(name, same / len(samples), kl / len(samples), correct / len(samples), len(samples))
        for name, (same, kl, correct) in zip(names, sums.tolist(), strict=True)
    ]
