"""Requirements of an objective on its stores, and the `precompute run` command that adds missing arrays."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.data import PRESETS, ViewRecipe
from coursepack.data.store.manifest import LOGITS
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import FeaturePair
from coursepack.distill.setup.student import blocks, depth_of, probe_student
from coursepack.distill.targets.base import FEATURES
from coursepack.errors import CoursepackError, RecipeError
from coursepack.models import build_network, parse_tap
from coursepack.models.build import WEIGHTS_FILE
from coursepack.models.load import own_preprocessing
from coursepack.models.taps import Tap, tap_from_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from coursepack.data.store import Manifest, StoreReader
    from coursepack.distill.losses.base import PairNeeds
    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.models import Network

Pairs = dict[str, list[tuple[int, str, str]]]
"""Teacher index, tap name and student layer of every pair, by the key of the term that compares them."""


def term_pairs(config: ObjectiveConfig, readers: Sequence[StoreReader], student: Network) -> Pairs:
    """Return the pairs of taps and student layers of every term, as configured or as its needs choose them.

    Layers and taps are paired by relative depth. If a store has no usable tap, the pair names the teacher's
    block at that depth, with the first of the term's reductions.

    Raises:
        RecipeError: a configured pair names a teacher that does not exist.
    """
    pairs: Pairs = {}
    for key, term in config.all_terms().items():
        needs = LOSSES[term.term].needs(term).pairs
        if needs is not None:
            pairs[key] = _pairs(f"terms.{key}", needs, readers, student)
    return pairs


def _pairs(
    where: str, needs: PairNeeds, readers: Sequence[StoreReader], student: Network
) -> list[tuple[int, str, str]]:
    if needs.pairs:
        for pair in needs.pairs:
            if pair.teacher >= len(readers):
                raise RecipeError(
                    f"{where}.pairs names teacher {pair.teacher}, but there are {len(readers)} stores: "
                    "indices begin at 0"
                )
        return [(pair.teacher, parse_tap(pair.tap).name, pair.layer) for pair in needs.pairs]
    layers = list(needs.layers) or blocks(student.module)
    pairs = []
    for index, reader in enumerate(readers):
        taps = _taps_of(reader.manifest, needs.reductions)
        for number in _chosen(needs.choose, index, len(readers), len(layers)):
            depth = number / (len(layers) - 1) if len(layers) > 1 else float(needs.choose != "depth")
            pairs.append((index, taps[round(depth * (len(taps) - 1))], layers[number]))
    return pairs


def _chosen(choose: str, teacher: int, teachers: int, layers: int) -> Sequence[int]:
    """Return the indices of the student layers that a teacher is compared with."""
    if choose == "depth":
        return [depth_group(teacher, teachers, layers)]
    return range(layers) if choose == "every" else [layers - 1]


def depth_group(teacher: int, teachers: int, groups: int) -> int:
    """Return the index of the student group that a teacher guides, spread evenly from shallow to deep.

    A single teacher guides the middle group, as in FitNets.

    >>> [depth_group(teacher, 3, 4) for teacher in range(3)]
    [0, 2, 3]
    """
    if teachers == 1:
        return (groups - 1) // 2
    return (2 * teacher * (groups - 1) + teachers - 1) // (2 * (teachers - 1))


def _taps_of(manifest: Manifest, reductions: Sequence[str]) -> list[str]:
    """Return a store's usable taps, shallow to deep, or else the taps of the teacher's blocks to add."""
    module = _untrained(manifest.identity["teacher"]["network"], len(manifest.class_names))
    taps = [name.removeprefix(FEATURES) for name in manifest.arrays if name.startswith(FEATURES)]
    usable = [name for name in taps if tap_from_name(name).reduction in reductions]
    order = {} if module is None else depth_of(module)
    usable.sort(key=lambda name: order.get(tap_from_name(name).layers[0], 0))
    layers = ([] if module is None else blocks(module)) or ["LAYER"]
    return usable or [Tap((layer,), reductions[0]).name for layer in layers]


def _untrained(spec: str, classes: int) -> nn.Module | None:
    """Return a teacher's network for its layer names; None for user code, which stores must not run."""
    if spec.startswith("python:"):
        return None
    try:
        return build_network(spec, classes).module
    except CoursepackError:
        return None


def needed_arrays(
    method: str,
    readers: Sequence[StoreReader],
    pairs: Pairs,
    *,
    logits: bool,
    root: str | None,
) -> list[list[str]]:
    """Return the names of the arrays to read from each store.

    Raises:
        RecipeError: an array is not stored; the message has the command that adds it.
    """
    arrays = [[LOGITS] if logits else [] for _ in readers]
    for index, tap, _ in itertools.chain(*pairs.values()):
        name = f"{FEATURES}{tap}"
        if name not in arrays[index]:
            arrays[index].append(name)
    missing = []
    for reader, names in zip(readers, arrays, strict=True):
        absent = [name for name in names if name not in reader.manifest.arrays]
        if absent:
            taps = [_tap_text(name.removeprefix(FEATURES)) for name in absent]
            missing.append(
                f"store {str(reader.path)!r} has no {', '.join(map(repr, absent))}\n"
                f"  {precompute_command(reader, root, taps=taps)}"
            )
    if missing:
        raise RecipeError(
            f"method {method!r} needs features that are not stored. Add them with\n" + "\n".join(missing)
        )
    return arrays


def _tap_text(name: str) -> str:
    """Return a tap as a value of `--tap`."""
    tap = tap_from_name(name)
    text = "+".join(tap.layers)
    if tap.reduction == "map" and tap.size is None:
        return text
    return f"{text}:{tap.reduction}" + ("" if tap.size is None else f":{tap.size}")


def shaped_pairs(
    config: ObjectiveConfig,
    pairs: Pairs,
    readers: Sequence[StoreReader],
    student: Network,
    channels: int,
) -> dict[str, tuple[FeaturePair, ...]]:
    """Return the pairs of every term with the shapes of their features.

    Raises:
        RecipeError: features are neither maps nor vectors, or the term does not support their reduction.
        UnknownName: a layer does not exist in the student.
    """
    layers = sorted({name for _, _, layer in itertools.chain(*pairs.values()) for name in layer.split("+")})
    if not layers:
        return {}
    shapes = probe_student(student, channels, layers).features
    terms = config.all_terms()
    shaped = {}
    for key, of_term in pairs.items():
        needs = LOSSES[terms[key].term].needs(terms[key]).pairs
        assert needs is not None
        shaped[key] = tuple(_with_shapes(key, needs, readers, shapes, *pair) for pair in of_term)
    return shaped


def _with_shapes(
    key: str,
    needs: PairNeeds,
    readers: Sequence[StoreReader],
    shapes: Mapping[str, tuple[int, ...]],
    index: int,
    tap: str,
    layer: str,
) -> FeaturePair:
    reader = readers[index]
    teacher_shape = tuple(reader.manifest.arrays[f"{FEATURES}{tap}"].row_shape)
    reduction = tap_from_name(tap).reduction
    stored = f"{tap!r} of store {str(reader.path)!r}"
    sides = [(f"layer {name!r} of the student", shapes[name]) for name in layer.split("+")]
    # Other reductions have shapes of their own, which their terms know.
    sides += [(stored, teacher_shape)] if reduction in {"map", "pooled"} else []
    unfit = [(stored, teacher_shape)] if reduction not in needs.reductions else []
    unfit += [(side, shape) for side, shape in sides if len(shape) not in (1, 3)]
    for side, shape in unfit[:1]:
        raise RecipeError(
            f"term {key!r} cannot compare {side} (shape {shape}): it takes vectors (D,) and maps "
            f"(C, H, W), with the reductions {' and '.join(needs.reductions)}"
        )
    student_shapes = [shapes[name] for name in layer.split("+")]
    return FeaturePair(index, tap, layer, teacher_shape, *student_shapes)


def check_objective(recipe: TrainRecipe, readers: Sequence[StoreReader]) -> None:
    """Check a recipe's objective with `check_needs`."""
    check_needs(recipe.method, recipe.objective, readers, recipe.view, recipe.root)


def check_needs(
    method: str,
    objective: ObjectiveConfig,
    readers: Sequence[StoreReader],
    view: ViewRecipe,
    root: str | None,
) -> None:
    """Check that stores and views meet the needs of an objective.

    Raises:
        RecipeError: they do not; the message has a remedy.
    """
    if not isinstance(objective.adjustment, str) and len(objective.adjustment) != len(readers):
        raise RecipeError(
            f"adjustment has {len(objective.adjustment)} names, expected {len(readers)}: one per store"
        )
    if refusal := objective.fusion.refusal(len(readers)):
        raise RecipeError(refusal)
    needs = objective.needs()
    if needs.one_label and view.mix is not None:
        raise RecipeError(
            f"{needs.one_label}, but the view mixes images: a mixed image has two "
            "labels, so no prediction is wrong. Use stores of a view without mix, or "
            "--set objective.adjustment=none"
        )
    if needs.dense_logits:
        for reader in readers:
            if reader.manifest.arrays[LOGITS].encoding.to_dict()["name"] == "topk":
                dense = reader.path.with_name(f"{reader.name}-dense.zarr")
                line = precompute_command(reader, root, store=dense, encoding="float16")
                raise RecipeError(
                    f"method {method!r} ({needs.dense_logits}) needs all logits, but store "
                    f"{str(reader.path)!r} holds only the largest (topk). Write a dense store with\n"
                    f"  {line}\nor use CWSM, which reads only the student: --method dtd-cwsm"
                )


def precompute_command(
    reader: StoreReader,
    root: str | None,
    *,
    taps: Sequence[str] = (),
    store: Path | None = None,
    encoding: str | None = None,
) -> str:
    """Return the `precompute run` command that writes a store again, or adds taps to it."""
    manifest = reader.manifest
    teacher, weights = manifest.identity["teacher"], manifest.origin.get("weights_file")
    words = ["precompute", "run"]
    if weights is not None and Path(weights).name == WEIGHTS_FILE:
        spec = f"run:{Path(weights).parent}"
        words += ["--teacher", spec]
    else:
        spec = teacher["network"]
        words += ["--teacher", spec, "--weights", str(weights or "FILE")]
    words += _pixel_options(spec, teacher["preprocessing"])
    words += ["--source", manifest.identity["source"]["name"]]
    words += [] if root is None else ["--root", root]
    words += [*_view_options(manifest), "--views", str(manifest.views)]
    words += [] if teacher.get("columns") is None else ["--classes", "FILE"]
    logits = encoding or manifest.arrays[LOGITS].encoding.name
    words += [] if logits == "float16" else ["--encoding", logits]
    words += ["--store", str(store or reader.path)]
    for tap in taps:
        words += ["--tap", tap]
    return shlex.join(words)


def _pixel_options(spec: str, stored: Mapping[str, Any]) -> list[str]:
    """Return options for the teacher's preprocessing if it differs from the network's or is unknown."""
    try:
        own = own_preprocessing(spec)
    except CoursepackError:
        own = None
    usual = {} if own is None else own.model_dump(mode="json")
    words = []
    for name in ("size", "mean", "std"):
        if usual.get(name) != stored[name]:
            value = [stored[name]] if name == "size" else stored[name]
            words += [f"--{name}", ",".join(map(str, value))]
    return words


def _view_options(manifest: Manifest) -> list[str]:
    recipe = ViewRecipe.model_validate(manifest.identity["view"]["recipe"])
    for name, preset in PRESETS.items():
        if preset.model_copy(update={"seed": recipe.seed}) == recipe:
            seed = [] if recipe.seed == preset.seed else ["--view-seed", str(recipe.seed)]
            return ["--view", name, *seed]
    return ["--view", "FILE"]
