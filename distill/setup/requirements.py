"""Requirements of an objective on its stores, and the `precompute run` command that adds missing arrays."""

from __future__ import annotations

import itertools
import shlex
from typing import TYPE_CHECKING, Any

from torch import nn

from coursepack.data import PRESETS, ViewRecipe
from coursepack.data.encodings import drops_classes
from coursepack.data.store.manifest import FEATURES, LOGITS, STATIC
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import BuildContext, FeaturePair
from coursepack.distill.setup.classes import check_classes
from coursepack.distill.setup.fitting import Fitting, problem_of
from coursepack.distill.setup.student import UNFIT, blocks, depth_of, probe_student
from coursepack.distill.setup.teacher import accuracy, tap_shapes, untrained
from coursepack.errors import CoursepackError, RecipeError
from coursepack.models import parse_tap
from coursepack.models.hubs import has_weights
from coursepack.models.load import own_preprocessing
from coursepack.models.run_specs import spec_of_weights
from coursepack.models.taps import Tap, tap_from_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from coursepack.data.store import Manifest, StoreReader
    from coursepack.distill.losses.base import PairNeeds
    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.models import Network

Pairs = dict[str, list[tuple[int, str, str]]]
"""Teacher index, tap name and student layer of every pair, by the key of the term that compares them."""


def term_pairs(config: ObjectiveConfig, teachers: Sequence[Manifest], student: Network) -> Pairs:
    """Return the pairs of taps and student layers of every term, as configured or as its needs choose them.

    Layers and taps are paired by relative depth, or by map size where every layer is compared and some of
    these pairs cannot be. If a store has no usable tap, the pair names the teacher's block there, with the
    first of the term's reductions.

    Raises:
        RecipeError: a configured pair names a teacher that does not exist.
    """
    pairs: Pairs = {}
    for key, term in config.all_terms().items():
        needs = LOSSES[term.term].needs(term).pairs
        if needs is not None:
            pairs[key] = _pairs(f"terms.{key}", needs, teachers, student)
    return pairs


def _pairs(
    where: str, needs: PairNeeds, teachers: Sequence[Manifest], student: Network
) -> list[tuple[int, str, str]]:
    if needs.pairs:
        for pair in needs.pairs:
            if pair.teacher >= len(teachers):
                raise RecipeError(
                    f"{where}.pairs names teacher {pair.teacher}, but there are {len(teachers)} stores: "
                    "indices begin at 0"
                )
        return [(pair.teacher, parse_tap(pair.tap).name, pair.layer) for pair in needs.pairs]
    layers = list(needs.layers) or _blocks(student, needs)
    layers = (
        [f"{first}+{second}" for first, second in itertools.pairwise(layers)] if _flows(needs) else layers
    )
    if not layers:
        raise RecipeError(
            f"student {student.spec!r} has no two consecutive blocks that give maps: name layers with "
            f"{where}.pairs"
        )
    pairs = []
    for index, manifest in enumerate(teachers):
        taps = _taps_of(manifest, needs)
        chosen = {}
        for number in _chosen(needs.choose, index, len(teachers), len(layers)):
            depth = number / (len(layers) - 1) if len(layers) > 1 else float(needs.choose != "depth")
            chosen[layers[number]] = depth * (len(taps) - 1)
        if needs.choose in {"every", "flows"}:
            pairs += [(index, *pair) for pair in _fitting(needs, manifest, taps, student, chosen)]
        else:
            pairs += [(index, taps[round(depth)], layer) for layer, depth in chosen.items()]
    return pairs


def _fitting(
    needs: PairNeeds,
    manifest: Manifest,
    taps: Sequence[str],
    student: Network,
    depths: Mapping[str, float],
) -> list[tuple[str, str]]:
    """Return each student layer with the tap at its depth, or by map size if some of these do not fit.

    By map size, a layer is paired with the nearest tap of its size that can be compared with it. A flow that
    has none is left out; another layer stays with the tap at its depth.

    Args:
        needs: the term's needs.
        manifest: the teacher's store.
        taps: names of the teacher's taps, shallow to deep.
        student: the student.
        depths: position in `taps`, possibly between two of them, by student layer.
    """
    fitting = Fitting(needs, manifest, taps, student, list(depths))
    by_depth = [(taps[round(depth)], layer) for layer, depth in depths.items()]
    if all(fitting.fits(tap, layer) for tap, layer in by_depth):
        return by_depth
    by_size = {}
    for layer, depth in depths.items():
        alike = [tap for tap in taps if fitting.same_size(tap, layer) and fitting.fits(tap, layer)]
        if alike:
            by_size[layer] = min(alike, key=lambda tap: abs(taps.index(tap) - depth))
    if _flows(needs) and by_size:
        return [(tap, layer) for layer, tap in by_size.items()]
    return [(by_size.get(layer, tap), layer) for tap, layer in by_depth]


def _chosen(choose: str, teacher: int, teachers: int, layers: int) -> Sequence[int]:
    """Return the indices of the student layers that a teacher is compared with."""
    if choose == "depth":
        return [depth_group(teacher, teachers, layers)]
    return [layers - 1] if choose == "last" else range(layers)


def _flows(needs: PairNeeds) -> bool:
    return needs.choose == "flows"


def depth_group(teacher: int, teachers: int, groups: int) -> int:
    """Return the index of the student group that a teacher guides, spread evenly from shallow to deep.

    A single teacher guides the middle group, as in FitNets.

    >>> [depth_group(teacher, 3, 4) for teacher in range(3)]
    [0, 2, 3]
    """
    if teachers == 1:
        return (groups - 1) // 2
    return (2 * teacher * (groups - 1) + teachers - 1) // (2 * (teachers - 1))


def _taps_of(manifest: Manifest, needs: PairNeeds) -> list[str]:
    """Return a store's usable taps, shallow to deep, or else the taps of the teacher's blocks to add."""
    network = untrained(manifest)
    arrays = {
        n.removeprefix(FEATURES): array for n, array in manifest.arrays.items() if n.startswith(FEATURES)
    }
    stored = [(tap_from_name(name), array.row_shape) for name, array in arrays.items()]
    usable = [tap for tap, shape in stored if _is_usable(tap, shape, needs)]
    order = {} if network is None else depth_of(network.module)
    usable.sort(key=lambda tap: order.get(tap.layers[0], 0))
    if needs.maps or needs.choose == "last":
        usable = _one_per_layer(usable, needs.reductions)
    return [tap.name for tap in usable or _taps_to_add(manifest, network, needs)]


def _taps_to_add(manifest: Manifest, network: Network | None, needs: PairNeeds) -> list[Tap]:
    """Return taps of the teacher's blocks, with the first reduction that the term supports and they allow."""
    first, layers = needs.reductions[0], [] if network is None else _layers_to_tap(network, needs)
    if _flows(needs):
        return [Tap(two, first) for two in itertools.pairwise(layers)] or [Tap(("LAYER", "LAYER"), first)]
    try:
        shapes = tap_shapes(manifest, layers if first == "pooled" else []) or {}
    except (CoursepackError, *UNFIT):
        shapes = {}
    vectors = {layer for layer, shape in shapes.items() if len(shape) == 1}
    return [Tap((layer,), "map" if layer in vectors else first) for layer in layers or ["LAYER"]]


def _one_per_layer(taps: Sequence[Tap], reductions: Sequence[str]) -> list[Tap]:
    """Return one tap of each layer: whole rather than sketched, of the first reduction that there is."""
    ranked = sorted(taps, key=lambda tap: (tap.sketch is not None, reductions.index(tap.reduction)))
    best = {tap.layers: tap for tap in reversed(ranked)}
    return [best[layers] for layers in dict.fromkeys(tap.layers for tap in taps)]


def _is_usable(tap: Tap, shape: Sequence[int], needs: PairNeeds) -> bool:
    if tap.reduction not in needs.reductions or len(tap.layers) != (2 if _flows(needs) else 1):
        return False
    if tap.sketch is not None:
        return tap.reduction in needs.sketches
    return not needs.maps or tap.reduction != "map" or len(shape) == 3


def _blocks(network: Network, needs: PairNeeds) -> list[str]:
    """Return the names of a network's blocks that a term can compare."""
    names = blocks(network.module)
    if not needs.maps:
        return names
    try:
        shapes = probe_student(network, network.preprocessing.channels, names).features
    except CoursepackError:
        return names
    return [name for name in names if len(shapes[name]) == 3] or names


def _layers_to_tap(network: Network, needs: PairNeeds) -> list[str]:
    """Return a network's blocks, or for margins the last batch normalization in each that has one."""
    layers = _blocks(network, needs)
    if needs.reductions[0] != "margin":
        return layers
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    norms = [name for name, layer in network.module.named_modules() if isinstance(layer, kinds)]
    inside = [[norm for norm in norms if f"{norm}.".startswith(f"{layer}.")] for layer in layers]
    return [found[-1] for found in inside if found] or layers


def logits_read(config: ObjectiveConfig, teachers: Sequence[Manifest]) -> tuple[int, ...]:
    """Return the indices of the teachers whose logits are read in any step."""
    return config.logits_read(BuildContext(len(teachers), accuracies=tuple(map(accuracy, teachers))))


def needed_arrays(
    method: str,
    readers: Sequence[StoreReader],
    pairs: Pairs,
    *,
    logits: Collection[int],
    root: str | None,
) -> list[list[str]]:
    """Return the names of the arrays to read from each store.

    Args:
        method: name of the method, for error messages.
        readers: the stores.
        pairs: pairs of every term.
        logits: indices of the stores whose logits are read.
        root: folder of the source's files, for the command.

    Raises:
        RecipeError: an array is not stored; the message has the command that adds it.
    """
    arrays = [[LOGITS] if index in logits else [] for index in range(len(readers))]
    for index, tap, _ in itertools.chain(*pairs.values()):
        name = f"{FEATURES}{tap}"
        if name not in arrays[index]:
            arrays[index].append(name)
    missing = []
    for reader, names in zip(readers, arrays, strict=True):
        absent = [name for name in names if name not in reader.manifest.arrays]
        if absent:
            taps = [tap_from_name(name.removeprefix(FEATURES)).text for name in absent]
            missing.append(
                f"store {reader.address!r} has no {', '.join(map(repr, absent))}\n"
                f"  {precompute_command(reader, root, taps=taps)}"
            )
    if missing:
        raise RecipeError(
            f"method {method!r} needs features that are not stored. Add them with\n" + "\n".join(missing)
        )
    return arrays


def shaped_pairs(
    config: ObjectiveConfig,
    pairs: Pairs,
    readers: Sequence[StoreReader],
    student: Network,
    channels: int,
    root: str | None,
) -> dict[str, tuple[FeaturePair, ...]]:
    """Return the pairs of every term with the shapes of their features.

    Raises:
        RecipeError: features are neither maps nor vectors, or the term cannot compare them; the message has
            the command that stores others if that helps.
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
        shaped[key] = tuple(_with_shapes(key, needs, readers, shapes, root, *pair) for pair in of_term)
    return shaped


def _with_shapes(
    key: str,
    needs: PairNeeds,
    readers: Sequence[StoreReader],
    shapes: Mapping[str, tuple[int, ...]],
    root: str | None,
    index: int,
    tap: str,
    layer: str,
) -> FeaturePair:
    reader = readers[index]
    parsed, teacher_shape = tap_from_name(tap), tuple(reader.manifest.arrays[f"{FEATURES}{tap}"].row_shape)
    if parsed.sketch is not None:
        teacher_shape = tuple(int(value) for value in reader.static(tap))
    reduction = parsed.reduction
    stored = f"{tap!r} of store {reader.address!r}"
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
    pair = FeaturePair(index, tap, layer, teacher_shape, *student_shapes)
    if (problem := problem_of(pair, needs)) is not None:
        add = precompute_command(reader, root, taps=[problem.tap]) if problem.tap else ""
        raise RecipeError(
            f"term {key!r} cannot compare {stored} (shape {teacher_shape}) with layer {layer!r} of the "
            f"student (shape {' and '.join(map(str, student_shapes))}): {problem.problem}"
            + (f". Store another tap, and name it in terms.{key}.pairs, with\n  {add}" if add else "")
        )
    return pair


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
        enough = not objective.model_copy(update={"adjustment": "none"}).needs().one_label
        other = ", or --set objective.adjustment=none" if enough else ""
        raise RecipeError(
            f"{needs.one_label}, but the view mixes images: a mixed image has two labels. Use stores of a "
            f"view without mix{other}"
        )
    if readers:
        read = logits_read(objective, [reader.manifest for reader in readers])
        check_classes(method, objective, readers, read)
    if needs.teacher_head and len(readers) != 1:
        raise RecipeError(
            f"method {method!r} needs {needs.teacher_head} of one teacher, but there are {len(readers)} "
            "stores: give one"
        )
    if need := needs.teacher_head or needs.teacher_heads:
        _check_heads(method, need, readers, root)
    if needs.dense_logits:
        flsw = objective.dynamic_temperature.kind == "flsw"
        other = "\nor use CWSM, which reads only the student: --method dtd-cwsm" if flsw else ""
        for reader in readers:
            if drops_classes(reader.manifest.arrays[LOGITS].encoding):
                dense = f"{reader.address.removesuffix('.zarr')}-dense.zarr"
                line = precompute_command(reader, root, store=dense, encoding="float16")
                raise RecipeError(
                    f"method {method!r} ({needs.dense_logits}) needs all logits, but store "
                    f"{reader.address!r} holds only the largest (topk). Write a dense store with\n"
                    f"  {line}{other}"
                )


def _check_heads(method: str, need: str, readers: Sequence[StoreReader], root: str | None) -> None:
    """Check that every store holds its teacher's head."""
    for reader in readers:
        if f"{STATIC}/head_weight" not in reader.manifest.tables:
            raise RecipeError(
                f"method {method!r} needs {need}, but store {reader.address!r} has no "
                f"'{STATIC}/head_weight'. Add it with\n  {precompute_command(reader, root)}\n"
                "or use a teacher that ends in a linear layer of its classes: others have no such head"
            )


def precompute_command(
    reader: StoreReader,
    root: str | None,
    *,
    taps: Sequence[str] = (),
    store: str | None = None,
    encoding: str | None = None,
) -> str:
    """Return the `precompute run` command that writes a store again, or adds taps to it.

    Raises:
        RecipeError: the store was imported, so no command can.
    """
    manifest = reader.manifest
    teacher, weights = manifest.identity["teacher"], manifest.origin.get("weights_file")
    if "imported" in teacher:
        raise RecipeError(
            f"store {reader.address!r} was imported from {weights!r}: it has logits in the encoding "
            f"{manifest.arrays[LOGITS].encoding.name} and nothing else of its teacher, and the method needs "
            "more. Use a method that reads logits alone, such as kd, or a store that `precompute run` wrote"
        )
    words = ["precompute", "run"]
    run = None if weights is None else spec_of_weights(weights)
    if run is not None:
        spec = run
        words += ["--teacher", spec]
    elif has_weights(weights):
        spec = str(weights)
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
    words += ["--store", store or reader.address]
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
