"""What an objective needs of its stores, and the command that would add what is missing."""

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
from coursepack.distill.targets.stores import FEATURES
from coursepack.errors import CoursepackError, RecipeError
from coursepack.models import build_network, parse_tap
from coursepack.models.build import WEIGHTS_FILE
from coursepack.models.load import own_preprocessing
from coursepack.models.taps import tap_from_name

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
    """Find the pairs of features of every term: those that are given, or by depth.

    By depth, teachers are spread over the student's groups from shallow to deep, and each gives the tap of
    its store that is as deep in it; where there is none, the pair names the block that it should have tapped.

    Raises:
        RecipeError: a pair names a teacher that is not there.
    """
    found: Pairs = {}
    for key, term in config.all_terms().items():
        needs = LOSSES[term.term].needs(term).pairs
        if needs is not None:
            found[key] = _pairs(f"terms.{key}", needs, readers, student)
    return found


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
    groups = list(needs.layers) or blocks(student.module)
    found = []
    for index, reader in enumerate(readers):
        group = depth_group(index, len(readers), len(groups))
        depth = group / max(1, len(groups) - 1)
        found.append((index, _tap_at(reader.manifest, depth, needs.reductions), groups[group]))
    return found


def depth_group(teacher: int, teachers: int, groups: int) -> int:
    """Return the student's group that a teacher guides; teachers are spread evenly from shallow to deep.

    One teacher guides the middle, as in FitNets.

    >>> [depth_group(teacher, 3, 4) for teacher in range(3)]
    [0, 2, 3]
    """
    if teachers == 1:
        return (groups - 1) // 2
    return (2 * teacher * (groups - 1) + teachers - 1) // (2 * (teachers - 1))


def _tap_at(manifest: Manifest, depth: float, reductions: Sequence[str]) -> str:
    """The stored tap at a relative depth (0 to 1), or the teacher's block there."""
    module = _untrained(manifest.identity["teacher"]["network"], len(manifest.class_names))
    taps = [name.removeprefix(FEATURES) for name in manifest.arrays if name.startswith(FEATURES)]
    usable = [name for name in taps if tap_from_name(name).reduction in reductions]
    order = {} if module is None else depth_of(module)
    usable.sort(key=lambda name: order.get(tap_from_name(name).layers[0], 0))
    choices = usable or ([] if module is None else blocks(module)) or ["LAYER"]
    return choices[round(depth * (len(choices) - 1))]


def _untrained(spec: str, classes: int) -> nn.Module | None:
    """A teacher's network, to name its layers; none of a user's own, whose code a store must not run."""
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
    """What is read of each store.

    Raises:
        RecipeError: a store does not hold it; the text has the command that adds it.
    """
    arrays = [[LOGITS] if logits else [] for _ in readers]
    for index, tap, _ in itertools.chain(*pairs.values()):
        name = f"{FEATURES}{tap}"
        if name not in arrays[index]:
            arrays[index].append(name)
    missing = []
    for reader, names in zip(readers, arrays, strict=True):
        lacking = [name for name in names if name not in reader.manifest.arrays]
        if lacking:
            taps = [_tap_text(name.removeprefix(FEATURES)) for name in lacking]
            missing.append(
                f"store {str(reader.path)!r} has no {', '.join(map(repr, lacking))}\n"
                f"  {precompute_line(reader, root, taps=taps)}"
            )
    if missing:
        raise RecipeError(
            f"method {method!r} needs features that are not stored. Add them with\n" + "\n".join(missing)
        )
    return arrays


def _tap_text(name: str) -> str:
    """A tap as a flag says it."""
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
    """Return the pairs of every term with their shapes.

    Raises:
        RecipeError: features that are neither maps nor vectors, or of a reduction that the term cannot
            compare.
        UnknownName: a layer that the student does not have.
    """
    layers = sorted({layer for _, _, layer in itertools.chain(*pairs.values())})
    if not layers:
        return {}
    shapes = probe_student(student, channels, layers).features
    terms = config.all_terms()
    found = {}
    for key, of_term in pairs.items():
        needs = LOSSES[terms[key].term].needs(terms[key]).pairs
        assert needs is not None
        found[key] = tuple(_shaped(key, needs, readers, shapes, *pair) for pair in of_term)
    return found


def _shaped(
    key: str,
    needs: PairNeeds,
    readers: Sequence[StoreReader],
    shapes: Mapping[str, tuple[int, ...]],
    index: int,
    tap: str,
    layer: str,
) -> FeaturePair:
    reader = readers[index]
    theirs = tuple(reader.manifest.arrays[f"{FEATURES}{tap}"].row_shape)
    usable = tap_from_name(tap).reduction in needs.reductions
    for side, shape in (
        (f"{tap!r} of store {str(reader.path)!r}", theirs),
        (f"layer {layer!r} of the student", shapes[layer]),
    ):
        if len(shape) not in (1, 3) or not usable:
            raise RecipeError(
                f"term {key!r} cannot compare {side} (shape {shape}): it takes vectors (D,) and maps "
                f"(C, H, W), with the reductions {' and '.join(needs.reductions)}"
            )
    return FeaturePair(index, tap, layer, theirs, shapes[layer])


def check_objective(recipe: TrainRecipe, readers: Sequence[StoreReader]) -> None:
    """`check_needs` of a recipe."""
    check_needs(recipe.method, recipe.objective, readers, recipe.view, recipe.root)


def check_needs(
    method: str,
    objective: ObjectiveConfig,
    readers: Sequence[StoreReader],
    view: ViewRecipe,
    root: str | None,
) -> None:
    """Refuse what the objective's numbers ask of stores and views in vain.

    Raises:
        RecipeError: the text says what to do.
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
            "labels and no answer to it is wrong. Use stores of a view without mix, or "
            "--set objective.adjustment=none"
        )
    if needs.dense_logits:
        for reader in readers:
            if reader.manifest.arrays[LOGITS].encoding.to_dict()["name"] == "topk":
                dense = reader.path.with_name(f"{reader.name}-dense.zarr")
                line = precompute_line(reader, root, store=dense, encoding="float16")
                raise RecipeError(
                    f"method {method!r} ({needs.dense_logits}) needs all logits, but store "
                    f"{str(reader.path)!r} keeps the largest alone (topk). Write a dense store with\n"
                    f"  {line}\nor use CWSM, which looks at the student only: --method dtd-cwsm"
                )


def precompute_line(
    reader: StoreReader,
    root: str | None,
    *,
    taps: Sequence[str] = (),
    store: Path | None = None,
    encoding: str | None = None,
) -> str:
    """The `precompute run` that writes such a store again, or adds taps to it."""
    manifest = reader.manifest
    teacher, weights = manifest.identity["teacher"], manifest.origin.get("weights_file")
    words = ["precompute", "run"]
    if weights is not None and Path(weights).name == WEIGHTS_FILE:
        spec = f"run:{Path(weights).parent}"
        words += ["--teacher", spec]
    else:
        spec = teacher["network"]
        words += ["--teacher", spec, "--weights", str(weights or "FILE")]
    words += _pixel_words(spec, teacher["preprocessing"])
    words += ["--source", manifest.identity["source"]["name"]]
    words += [] if root is None else ["--root", root]
    words += [*_view_words(manifest), "--views", str(manifest.views)]
    words += [] if teacher.get("columns") is None else ["--classes", "FILE"]
    logits = encoding or manifest.arrays[LOGITS].encoding.name
    words += [] if logits == "float16" else ["--encoding", logits]
    words += ["--store", str(store or reader.path)]
    for tap in taps:
        words += ["--tap", tap]
    return shlex.join(words)


def _pixel_words(spec: str, stored: Mapping[str, Any]) -> list[str]:
    """The flags for what a teacher saw that is not, or may not be, what it expects by itself."""
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


def _view_words(manifest: Manifest) -> list[str]:
    recipe = ViewRecipe.model_validate(manifest.identity["view"]["recipe"])
    for name, preset in PRESETS.items():
        if preset.model_copy(update={"seed": recipe.seed}) == recipe:
            seed = [] if recipe.seed == preset.seed else ["--view-seed", str(recipe.seed)]
            return ["--view", name, *seed]
    return ["--view", "FILE"]
