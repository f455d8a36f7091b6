"""Smoke tests: any recipe in seconds, on synthetic images and stores of tiny untrained teachers.

A smoke test does not measure accuracy. It shows that a recipe is complete, that its student accepts the
views, and that its objective can be computed. Teachers are a single convolution with random weights. Each
layer that the recipe taps returns maps of the shape of the student layer that it is compared with.
"""

from __future__ import annotations

from dataclasses import replace
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
from coursepack.data.store.manifest import FEATURES, LOGITS
from coursepack.data.views import draw
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import PairChoice
from coursepack.distill.recipe import LearningRateConfig
from coursepack.distill.schedule import Schedule
from coursepack.distill.setup.build import build_student, starts_trained
from coursepack.distill.setup.costs import planned_store
from coursepack.distill.setup.requirements import term_pairs
from coursepack.distill.setup.student import probe_student
from coursepack.models import parse_tap
from coursepack.models.build import seeded
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data import Source, ViewRecipe
    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.recipe import TrainRecipe

SAMPLES = 8
MAX_BATCH_SIZE = 4
MAX_LEARNING_RATE = 1e-3
"""Upper bound of the learning rate, since larger ones may diverge on noise."""
VIEWS = 2
SHARPNESS = 4
"""Factor of the teachers' logits."""
DEFAULT_TAP = "smoke"
"""Tap in the stores of recipes that choose taps by depth."""
MAP_SHAPE = (8, 4, 4)
"""Shape of a smoke teacher's map."""


def smoke_recipe(recipe: TrainRecipe, folder: Path) -> TrainRecipe:
    """Return a recipe shortened to two epochs on synthetic images, with stores written to `folder`.

    A fusion with more phases has one epoch for each. Peers that start from a run or a store are networks of
    the student's kind.
    """
    source = open_source(stand_in(recipe.source, SAMPLES))
    recipe = recipe.model_copy(update={"objective": _with_flows(recipe, source)})
    taps: dict[int, list[str]] = {}
    layers: dict[str, str] = {}
    free = False
    for term in recipe.objective.all_terms().values():
        needs = LOSSES[term.term].needs(term)
        free |= needs.pairs is not None and not needs.pairs.pairs
        for pair in () if needs.pairs is None else needs.pairs.pairs:
            tap = parse_tap(pair.tap)
            taps.setdefault(pair.teacher, []).append(tap.name)
            # A teacher's head fixes the width of the maps that it reads.
            if not (needs.teacher_head or needs.teacher_heads):
                layers |= dict(zip(tap.layers, pair.layer.split("+"), strict=False))
    shapes = _map_shapes(layers, recipe, source)
    batch_size = max(min(recipe.batch_size, MAX_BATCH_SIZE), VIEWS)
    objective = _shortened(recipe.objective)
    stores = []
    for index, store in enumerate(recipe.stores):
        path = folder / f"{index}-{Path(store).name}"
        own = [*taps.get(index, []), *([DEFAULT_TAP] if free else [])]
        write_smoke_store(path, source, recipe.view, own, seed=index, shapes=shapes)
        stores.append(str(path))
    return recipe.model_copy(
        update={
            "peers": tuple(recipe.student if starts_trained(peer) else peer for peer in recipe.peers),
            "source": source.name,
            "evaluation": evaluation_spec(source.name),
            "root": None,
            "group": None if recipe.group is None else str(folder / "group"),
            "stores": tuple(stores),
            "online": False,
            "views": None if not stores else VIEWS,
            "views_per_load": min(recipe.views_per_load, VIEWS),
            "limit": None if recipe.limit is None else min(recipe.limit, SAMPLES),
            "epochs": max(2, objective.fusion.fewest_epochs(len(stores))),
            "patience": None if recipe.patience is None else 1,
            "keep_checkpoints": None if recipe.keep_checkpoints is None else 1,
            "evaluate_every": 1,
            "batch_size": batch_size,
            "accumulate": min(recipe.accumulate, batch_size),
            "objective": objective,
            "optimizer": _shortened(recipe.optimizer).model_copy(
                update={"lr": min(recipe.optimizer.lr, MAX_LEARNING_RATE)}
            ),
        }
    )


def _shortened(value: Any) -> Any:
    """Return a config with all schedules and phases, at any depth, shortened to fit two epochs."""
    if isinstance(value, Schedule):
        return value.model_copy(update={"epochs": 1})
    if hasattr(value, "model_fields_set"):
        fields = {name: _shortened(getattr(value, name)) for name in type(value).model_fields}
        for phase in ("epochs", "label_epochs", "joint_epochs", "paraphraser_epochs"):
            if fields.get(phase):
                fields[phase] = (1,) * len(fields[phase]) if isinstance(fields[phase], tuple) else 1
        if isinstance(value, LearningRateConfig):
            fields["warmup_epochs"] = min(value.warmup_epochs, 1.0)
            fields["milestones"] = value.milestones and (1,)
        return value.model_copy(update=fields)
    if isinstance(value, dict):
        return {name: _shortened(inner) for name, inner in value.items()}
    return value


def _with_flows(recipe: TrainRecipe, source: Source) -> ObjectiveConfig:
    """Return the objective with the pairs that its flows choose for teachers of the student's network."""
    named = {}
    for key, term in recipe.objective.all_terms().items():
        needs = LOSSES[term.term].needs(term).pairs
        if needs is not None and needs.choose == "flows" and not needs.pairs:
            student = build_student(recipe, source)
            teachers = [planned_store(student.spec, student.classes, SAMPLES)] * len(recipe.stores)
            named[key] = term.model_copy(
                update={
                    "pairs": tuple(
                        PairChoice(teacher=index, tap=tap_from_name(tap).text, layer=layer)
                        for index, tap, layer in term_pairs(recipe.objective, teachers, student)[key]
                    )
                }
            )
    return recipe.objective.model_copy(update={"terms": recipe.objective.terms | named})


def _map_shapes(layers: Mapping[str, str], recipe: TrainRecipe, source: Source) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the student layers that give maps, by the teacher's layer to compare with each."""
    if not layers:
        return {}
    student = build_student(recipe, source)
    shapes = probe_student(student, source.channels, sorted(set(layers.values()))).features
    return {name: shapes[layer] for name, layer in layers.items() if len(shapes[layer]) == 3}


def write_smoke_store(
    path: Path,
    source: Source,
    recipe: ViewRecipe,
    taps: Sequence[str],
    *,
    seed: int,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write the store of an untrained teacher for all samples of a source.

    Args:
        path: folder of the store.
        source: the samples.
        recipe: the view recipe.
        taps: names of the taps to store.
        seed: seed of the teacher's weights.
        shapes: shapes `(C, H, W)` of the maps of the teacher's layers, by layer; others have `MAP_SHAPE`.
    """
    size = next(iter(source.sizes(np.arange(1))))[0].item()
    run_teacher, static = _teacher(source, taps, shapes or {}, seed)
    pixels = {"size": size, "mean": [0.0] * source.channels, "std": [1.0] * source.channels}
    identity = {
        "teacher": {"network": "smoke", "weights": str(seed), "preprocessing": pixels},
        "view": {"recipe": recipe.model_dump(mode="json"), "fingerprint": view_fingerprint(recipe, source)},
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "precision": "float32",
    }
    float32 = parse_encoding("float32")
    black = torch.zeros(1, size, size, source.channels)
    rows = {name: value.shape[1:] for name, value in run_teacher(black).items()}
    sketched = [name for name in taps if tap_from_name(name).sketch is not None]
    whole = {name: replace(tap_from_name(name), sketch=None).name for name in sketched}
    before = _teacher(source, list(whole.values()), shapes or {}, seed)[0](black)
    for name, tap in whole.items():
        static[name] = np.array(before[f"{FEATURES}{tap}"].shape[1:], np.float32)
    plan = StorePlan(
        identity=identity,
        origin={},
        labels=source.labels,
        class_names=source.class_names,
        views=VIEWS,
        arrays={name: (float32, tuple(shape)) for name, shape in rows.items()},
        static=static,
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
                files.add({name: value.numpy() for name, value in run_teacher(batch.pixels(size)).items()})
            files.finish({"rows": float(len(block)), "correct": 0.0})
        writer.commit()


def _teacher(
    source: Source, taps: Sequence[str], shapes: Mapping[str, tuple[int, ...]], seed: int
) -> tuple[Any, dict[str, NDArray[np.float32]]]:
    """Return a function from pixels `(N, size, size, channels)` to arrays by name, and the teacher's head."""
    with seeded(seed):
        layer = nn.Conv2d(source.channels, MAP_SHAPE[0], 3, stride=2, padding=1)
        head = nn.Linear(MAP_SHAPE[0], len(source.class_names)).requires_grad_(False)

    @torch.inference_mode()
    def run_teacher(pixels: Tensor) -> Mapping[str, Tensor]:
        maps = nn.functional.adaptive_avg_pool2d(
            layer(pixels.permute(0, 3, 1, 2).float() / 255), MAP_SHAPE[1:]
        )
        features = {f"{FEATURES}{name}": _tapped(maps, name, shapes) for name in taps}
        return {LOGITS: SHARPNESS * head(maps.mean((2, 3))), **features}

    constants = {"head_weight": head.weight, "head_bias": head.bias}
    return run_teacher, {name: (SHARPNESS * value).numpy() for name, value in constants.items()}


def _tapped(maps: Tensor, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Return the features of a tap, from maps in which channels and positions are repeated or averaged."""
    tap, outputs = tap_from_name(name), []
    for layer in tap.layers:
        channels, height, width = shapes.get(layer, MAP_SHAPE)
        chosen = maps[:, torch.arange(channels) % maps.shape[1]]
        outputs.append(nn.functional.adaptive_avg_pool2d(chosen, (height, width)))
    return tap.reduce(outputs, torch.zeros(outputs[0].shape[1]) if tap.reduction == "margin" else None)
