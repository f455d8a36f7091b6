"""Parts of what hints add to a training step, each timed by itself on the features of one batch.

A plain training step is among the alternated variants, so that every part finds caches as in training. What
is left of the difference between the steps is the gradient that enters the student at its inner layers, and
the update of the adapters.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import torch
from _harness import measure, ratios, row
from _train_place import DEVICE, stepper

from coursepack.distill.losses.base import LossInputs, StudentOutput
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import FEATURES
from coursepack.distill.training.state import make_state
from coursepack.kernels import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _harness import Row, Seconds
    from _train_place import Place
    from torch import Tensor

    from coursepack.data import Batch
    from coursepack.distill.setup.prepare import Setup
    from coursepack.kernels import Rows

PARTS = ("read", "forward", "backward")
"""Parts that add up to the hints' own cost."""


def hint_parts(
    place: Place, students: Sequence[str], sizes: Sequence[tuple[int, int]], patience: float
) -> list[Row]:
    """Measure the parts for every student, and every batch size with its number of rounds."""
    found = []
    for student, (batch_size, rounds) in itertools.product(students, sizes):
        setup = prepare(place.recipe(student, "amtml-hints", batch_size), DEVICE)
        plain = stepper(prepare(place.recipe(student, "supervised", batch_size), DEVICE))
        title = f"{student}, batch {batch_size}"
        config = {"student": student, "batch": batch_size, "teachers": list(place.names)}
        found += measure(
            {"plain": plain, **_variants(setup)}, rounds,
            lambda seconds, rest=(title, config): _rows(seconds, *rest), patience=patience,
        )  # fmt: skip
    return found


def _variants(setup: Setup) -> dict[str, Callable[[], Any]]:
    learner, batch = make_state(setup).learner, next(iter(setup.batches(0)))
    learner.train()
    features = {
        name: value.detach().requires_grad_() for name, value in learner.predict(batch).features.items()
    }
    module, stored = learner.objective.terms["hint"], _read(setup, batch)
    logits = learner.logits(batch).detach()
    assert setup.targets is not None
    targets = setup.targets.fetch(batch)
    inputs = LossInputs(StudentOutput(logits, features=features), batch.labels, targets)

    def backward() -> float:
        loss = module(inputs).mean()
        started = time.perf_counter()
        loss.backward()
        seconds = time.perf_counter() - started
        for tensor in (*features.values(), *module.parameters()):
            tensor.grad = None
        return seconds

    adapted = [(features[pair.layer], each) for pair, each in zip(module.pairs, module.adapters, strict=True)]
    slopes = [torch.randn_like(adapter(values)) for values, adapter in adapted]

    def adapters_alone() -> None:
        torch.autograd.backward([adapter(values) for values, adapter in adapted], slopes)
        for tensor in (*features.values(), *module.parameters()):
            tensor.grad = None

    return {
        "read": lambda: _read(setup, batch),
        "decode": lambda: [decode(rows) for rows in stored],
        "adapters": lambda: [adapter(values) for values, adapter in adapted],
        "adapters, forward and backward": adapters_alone,
        "forward": lambda: module(inputs),
        "backward": backward,
    }


def _read(setup: Setup, batch: Batch) -> list[Tensor | Rows]:
    """Return a batch's features of every teacher, as the stores hold them."""
    return [
        reader.rows(name, batch.view, batch.samples)
        for reader in setup.readers
        for name in reader.manifest.arrays
        if name.startswith(FEATURES)
    ]


def _rows(seconds: Seconds, title: str, config: dict[str, Any]) -> list[Row]:
    parts = [
        row(f"hints: {title}, {name}", [1e3 * s for s in values], "ms", config)
        for name, values in seconds.items()
        if name != "plain"
    ]
    shares = [
        sum(own) / plain for *own, plain in zip(*(seconds[name] for name in (*PARTS, "plain")), strict=True)
    ]
    limits = ratios(seconds, "adapters, forward and backward", "plain")
    return [
        *parts,
        row(f"hints: {title}, ({' + '.join(PARTS)}) / plain step", shares, "ratio", config),
        row(f"hints: {title}, (adapters, forward and backward) / plain step", limits, "ratio", config),
    ]
