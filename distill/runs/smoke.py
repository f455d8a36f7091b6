"""Any recipe in seconds: drawn images instead of its data, and stores of tiny untrained teachers.

A smoke run says nothing about accuracy. It shows that a recipe is complete, that its student takes its views,
and that its objective can be computed. Teachers are one convolution with fresh weights; whatever
tap the recipe's hints name, they give a map for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from coursepack.data import batches, open_source, view_fingerprint
from coursepack.data.drift import content_digest, probe_digests, probe_samples
from coursepack.data.encodings import parse_encoding
from coursepack.data.sources import evaluation_spec
from coursepack.data.sources.fake import stand_in
from coursepack.data.store import StorePlan, StoreWriter
from coursepack.data.store.manifest import LOGITS
from coursepack.data.views import draw
from coursepack.distill.losses import LOSSES
from coursepack.distill.recipe import LearningRateConfig
from coursepack.distill.schedule import Schedule
from coursepack.distill.targets.stores import FEATURES
from coursepack.models import parse_tap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from coursepack.data import Source, ViewRecipe
    from coursepack.distill.recipe import TrainRecipe

SAMPLES = 16
MOST_BATCH = 8
GENTLE = 1e-3
"""Largest learning rate: a few steps of a recipe's own on noise may diverge."""
VIEWS = 2
HINT = "smoke"
"""The tap that a smoke store has where a recipe leaves the choice to the depth."""


def smoke_recipe(recipe: TrainRecipe, folder: Path) -> TrainRecipe:
    """The recipe on drawn images for two epochs, with stores in `folder` in place of its own."""
    source = open_source(stand_in(recipe.source, SAMPLES))
    taps: dict[int, list[str]] = {}
    free = False
    for term in recipe.objective.all_terms().values():
        needs = LOSSES[term.term].needs(term).pairs
        free |= needs is not None and not needs.pairs
        for pair in () if needs is None else needs.pairs:
            taps.setdefault(pair.teacher, []).append(parse_tap(pair.tap).name)
    batch_size = max(min(recipe.batch_size, MOST_BATCH), VIEWS)
    stores = []
    for index, store in enumerate(recipe.stores):
        path = folder / f"{index}-{Path(store).name}"
        own = [*taps.get(index, []), *([HINT] if free else [])]
        write_smoke_store(path, source, recipe.view, own, seed=index)
        stores.append(str(path))
    return recipe.model_copy(
        update={
            "source": source.name,
            "evaluation": evaluation_spec(source.name),
            "root": None,
            "stores": tuple(stores),
            "online": False,
            "views": None if not stores else VIEWS,
            "views_per_load": min(recipe.views_per_load, VIEWS),
            "limit": None if recipe.limit is None else min(recipe.limit, SAMPLES),
            "epochs": 2,
            "patience": None if recipe.patience is None else 1,
            "evaluate_every": 1,
            "batch_size": batch_size,
            "accumulate": min(recipe.accumulate, batch_size),
            "objective": _shortened(recipe.objective),
            "optimizer": _shortened(recipe.optimizer).model_copy(
                update={"lr": min(recipe.optimizer.lr, GENTLE)}
            ),
        }
    )


def _shortened(value: Any) -> Any:
    """Schedules and phases within two epochs, anywhere in a config."""
    if isinstance(value, Schedule):
        return value.model_copy(update={"epochs": 1})
    if hasattr(value, "model_fields_set"):
        fields = {name: _shortened(getattr(value, name)) for name in type(value).model_fields}
        if fields.get("joint_epochs") is not None:
            fields["joint_epochs"] = 1
        if isinstance(value, LearningRateConfig):
            fields["warmup_epochs"] = min(value.warmup_epochs, 1.0)
            fields["milestones"] = value.milestones and (1,)
        return value.model_copy(update=fields)
    if isinstance(value, dict):
        return {name: _shortened(inner) for name, inner in value.items()}
    return value


def write_smoke_store(
    path: Path, source: Source, recipe: ViewRecipe, taps: Sequence[str], *, seed: int
) -> None:
    """A store of an untrained teacher over all of a source."""
    size = next(iter(source.sizes(np.arange(1))))[0].item()
    answer = _teacher(source, taps, seed)
    pixels = {"size": size, "mean": [0.0] * source.channels, "std": [1.0] * source.channels}
    identity = {
        "teacher": {"network": "smoke", "weights": str(seed), "preprocessing": pixels},
        "view": {"recipe": recipe.model_dump(mode="json"), "fingerprint": view_fingerprint(recipe, source)},
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "precision": "float32",
    }
    float32 = parse_encoding("float32")
    shapes = {
        name: value.shape[1:] for name, value in answer(torch.zeros(1, size, size, source.channels)).items()
    }
    plan = StorePlan(
        identity=identity,
        origin={},
        labels=source.labels,
        class_names=source.class_names,
        views=VIEWS,
        arrays={name: (float32, tuple(shape)) for name, shape in shapes.items()},
    )
    with StoreWriter(path, plan) as writer:
        for block in writer.pending():
            params = draw(recipe, source, block.samples, block.view)
            probed = probe_samples(len(source.labels), block.view)
            probed = probed[(probed >= block.start) & (probed < block.stop)]
            record: dict[str, Any] = {
                "draws": params.digest(),
                "probes": probe_digests(recipe, source, probed, params[probed - block.start], size),
                "environment": {},
            }
            if block.view == 0:
                record["content"] = content_digest(source, block.samples)
            files = writer.write(block, record)
            for batch in batches(source, recipe, block.samples, views=[block.view], batch_size=64):
                files.add({name: value.numpy() for name, value in answer(batch.pixels(size)).items()})
            files.finish({"rows": float(len(block)), "correct": 0.0})
        writer.commit()


def _teacher(source: Source, taps: Sequence[str], seed: int) -> Any:
    """From pixels `(N, size, size, channels)` to arrays by their name in a store."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layer = nn.Conv2d(source.channels, 8, 3, stride=2, padding=1)
        head = nn.Linear(8, len(source.class_names))

    @torch.inference_mode()
    def answer(pixels: Tensor) -> Mapping[str, Tensor]:
        maps = nn.functional.adaptive_avg_pool2d(layer(pixels.permute(0, 3, 1, 2).float() / 255), 4)
        pooled = maps.mean((2, 3))
        features = {f"{FEATURES}{tap}": pooled if "@pooled" in tap else maps for tap in taps}
        return {LOGITS: 4 * head(pooled), **features}

    return answer
