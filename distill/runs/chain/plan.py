"""A chain file resolved: every stage's recipe complete and checked before the first one runs."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from coursepack.config import parse_config
from coursepack.data import ViewRecipe, open_source, view_fingerprint, view_recipe
from coursepack.data.views import stored_view
from coursepack.distill.losses import LOSSES
from coursepack.distill.runs.chain.file import STAGE, read_chain, referenced, referenced_epoch, train_values
from coursepack.distill.runs.chain.planned import (
    PlannedStore,
    check_stored_arrays,
    check_stored_views,
    planned_manifest,
    stored_output,
)
from coursepack.distill.setup.build import build_student
from coursepack.distill.setup.checks import check_evaluation, check_recipe, check_student
from coursepack.distill.setup.requirements import check_needs
from coursepack.distill.setup.resolve import resolve_recipe
from coursepack.distill.targets.stores import open_stores
from coursepack.distill.targets.teacher_stores import check_store
from coursepack.errors import CoursepackError, RecipeError
from coursepack.imports import check_trusted
from coursepack.models import build_network, load_teacher, parse_tap
from coursepack.models.build import weights_fingerprint
from coursepack.models.classes import load_columns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from coursepack.data import Source
    from coursepack.data.store import StoreReader
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.chain.file import ChainConfig, PrecomputeConfig, StageConfig
    from coursepack.models import Network

ONLY_OF_RUNS = ("weights", "classes")
"""Fields of `precompute` that a student of the same chain has no use for."""


@dataclass(frozen=True)
class Stage:
    """One stage of a chain, resolved and checked."""

    name: str
    kind: str
    recipe: dict[str, Any]
    """Complete recipe as plain values, in which references remain references."""
    reads: tuple[str, ...]
    """Names of the earlier stages whose results the stage reads."""
    given: dict[str, Any]
    """Fingerprints of everything else that the stage reads."""
    train: TrainRecipe | None = None
    """Recipe of a stage that trains, with the paths of its stores."""
    source: Source | None = None
    """Training data."""
    evaluation: Source | None = None
    network: Network | None = None
    """Network that a stage trains, with fresh weights."""
    store: PlannedStore | None = None
    """Store that a stage writes."""
    epoch: int | None = None
    """Number of epochs after which the weights of the stage before are read; None means all of them."""


@dataclass
class _Planner:
    """Settings of all stages, and the stages so far."""

    chain: ChainConfig
    out: Path
    device: torch.device
    trust_code: bool
    stages: dict[str, Stage] = field(default_factory=dict)


def plan_chain(path: Path, out: Path, *, device: torch.device, trust_code: bool = False) -> list[Stage]:
    """Return the stages of a chain file, complete and checked as far as that is possible before they run.

    Args:
        path: the chain file.
        out: folder of the chain.
        device: device that the stages run on.
        trust_code: allow stores and runs to name Python code.

    Raises:
        CoursepackError: a stage cannot be run; the message names the stage.
    """
    planner = _Planner(read_chain(path), out, device, trust_code)
    kinds = {"train": _plan_train, "precompute": _plan_precompute, "ensemble": _plan_ensemble}
    for config in planner.chain.stages:
        with naming_stage(config.name):
            planner.stages[config.name] = kinds[config.kind](planner, config)
    return list(planner.stages.values())


@contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Add a stage's name to the errors that are raised inside the context."""
    try:
        yield
    except CoursepackError as error:
        error.args = (f"stage {name!r}: {error}",)
        raise


def run_folder(out: Path, name: str) -> Path:
    """Return the run folder of a stage that trains."""
    return out / name


def store_folder(out: Path, name: str) -> Path:
    """Return the store of a stage that precomputes."""
    return out / f"{name}.zarr"


# Stages that train.


def _plan_train(planner: _Planner, config: StageConfig) -> Stage:
    values = copy.deepcopy(train_values(planner.chain.base, config))
    texts = values.pop("stores", None) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        resolve_recipe({**values, "stores": texts}, "its recipe")  # refuses them, with everything else
    readers = [_reader(planner, text) for text in texts]
    if readers:
        _fill_in(values, readers[0], trust_code=planner.trust_code or referenced(texts[0]) is not None)
    resolved = resolve_recipe(values, "its recipe", trust_code=planner.trust_code)
    paths = [_store_path(planner, text) for text in texts]
    recipe = resolved.model_copy(update={"stores": tuple(paths)})
    if recipe.peers:
        raise RecipeError(
            f"it trains {1 + len(recipe.peers)} students together, expected one: train groups with `distill "
            "train`, and name run:FOLDER of a member in a stage that precomputes"
        )
    root = None if recipe.root is None else Path(recipe.root)
    source, evaluation = open_source(recipe.source, root), open_source(recipe.evaluation, root)
    source.check()
    evaluation.check()
    check_evaluation(source, evaluation)
    check_recipe(recipe)
    for reader in readers:
        check_store(reader, source, recipe.view)
    check_stored_views(recipe, readers)
    student = build_student(recipe, source)
    check_student(student, source)
    if readers:
        check_stored_arrays(recipe, readers, student)
        check_needs(recipe.method, recipe.objective, readers, recipe.view, recipe.root)
    given = {
        "source": source.fingerprint,
        "evaluation": evaluation.fingerprint,
        "view": view_fingerprint(recipe.view, source),
        "stores": {
            text: stored_output(reader.manifest)
            for text, reader in zip(texts, readers, strict=True)
            if referenced(text) is None
        },
    }
    plain = {**recipe.model_dump(mode="json"), "stores": texts}
    return Stage(
        config.name,
        "train",
        plain,
        tuple(dict.fromkeys(name for text in texts if (name := referenced(text)) is not None)),
        given,
        train=recipe,
        source=source,
        evaluation=evaluation,
        network=None if _is_wrapped(recipe) else student,
    )


def _reader(planner: _Planner, text: str) -> StoreReader:
    """Return the reader of a store, or for a store that a stage will write its `PlannedStore`."""
    name = referenced(text)
    if name is None:
        return open_stores([text])[0]
    return cast("StoreReader", planner.stages[name].store)


def _store_path(planner: _Planner, text: str) -> str:
    name = referenced(text)
    return text if name is None else str(store_folder(planner.out, name))


def _fill_in(values: dict[str, Any], first: StoreReader, *, trust_code: bool) -> None:
    """Fill in the fields that `distill train` takes from the first store."""
    identity, holder = first.manifest.identity, f"store {first.address!r}"
    stored = str(identity["source"]["name"])
    values.setdefault("method", "kd")
    if "source" not in values:
        values["source"] = check_trusted(stored, holder, trust_code=trust_code)
    if "view" not in values:
        values["view"] = stored_view(identity["view"]["recipe"], holder, trust_code=trust_code)
    if str(values["source"]).partition(":")[0] == stored.partition(":")[0] and values.get("root") is None:
        values["root"] = first.manifest.source_root


def _is_wrapped(recipe: TrainRecipe) -> bool:
    """Return true if a term wraps the student, so that its layers are known only with its store."""
    return any(LOSSES[term.term].wrap is not None for term in recipe.objective.all_terms().values())


# Stages that precompute.


def _plan_precompute(planner: _Planner, config: StageConfig) -> Stage:
    given = config.precompute
    assert given is not None
    before = planner.stages.get(referenced(given.teacher) or "")
    values = given.model_dump(mode="json")
    if before is not None:
        assert before.train is not None
        _check_epoch(before, given.teacher)
        useless = [name for name in ONLY_OF_RUNS if values[name] is not None]
        if useless:
            raise RecipeError(f"{useless[0]} is given, but its teacher is {given.teacher!r}: leave it out")
        values["source"] = given.source or before.train.source
        values["root"] = before.train.root if given.root is None else given.root
    elif given.source is None or given.view is None:
        missing = "source" if given.source is None else "view"
        raise RecipeError(f"its teacher is {given.teacher!r} and no stage of this chain: give its {missing}")
    source = open_source(values["source"], None if values["root"] is None else Path(values["root"]))
    source.check()
    values["source"] = source.name
    view = _view_of(given, before)
    values["view"] = view.model_dump(mode="json")
    del values["view_seed"]
    columns = None if given.classes is None else load_columns(Path(given.classes), source.class_names)
    network = _teacher(planner, given, before, source, columns)
    fixed: dict[str, Any] = {"source": source.fingerprint, "view": view_fingerprint(view, source)}
    if columns is not None:
        fixed["classes"] = list(columns)
    if before is None:
        fixed["teacher"] = weights_fingerprint(network.module)
    taps = [parse_tap(tap) for tap in given.taps]
    if before is not None and before.network is None:
        taps = []  # layers of a wrapped student are not known yet
    manifest = planned_manifest(
        given, source, view, network, taps, columns, root=values["root"], device=planner.device
    )
    return Stage(
        config.name,
        "precompute",
        values,
        () if before is None else (before.name,),
        fixed,
        source=source,
        store=PlannedStore(Path(f"{STAGE}{config.name}"), manifest, source.labels),
        epoch=referenced_epoch(given.teacher),
    )


def _check_epoch(before: Stage, teacher: str) -> None:
    """Check that the stage before keeps the checkpoint that a teacher is, if it is one."""
    assert before.train is not None
    epoch, every = referenced_epoch(teacher), before.train.keep_checkpoints
    if epoch is None:
        return
    if every is None:
        raise RecipeError(
            f"its teacher is {teacher!r}, but stage {before.name!r} keeps no checkpoints: give it "
            "keep_checkpoints, the number of epochs between two of them"
        )
    kept = range(every, before.train.epochs + 1, every)
    if epoch not in kept:
        raise RecipeError(
            f"its teacher is {teacher!r}, but stage {before.name!r} keeps no checkpoint after {epoch} "
            f"epochs: expected @{', @'.join(map(str, kept))}, or another keep_checkpoints there"
        )


def _view_of(given: PrecomputeConfig, before: Stage | None) -> ViewRecipe:
    """Return the view recipe of a store: the given one, or the one that its teacher was trained with."""
    if given.view is not None:
        return view_recipe(given.view, given.view_seed)
    assert before is not None
    assert before.train is not None
    if given.view_seed is None:
        return before.train.view
    changed = before.train.view.model_dump() | {"seed": given.view_seed}
    return parse_config(ViewRecipe, changed, "its view with view_seed")


def _teacher(
    planner: _Planner,
    given: PrecomputeConfig,
    before: Stage | None,
    source: Source,
    columns: Sequence[int | None] | None,
) -> Network:
    """Return the teacher of a store; one that a stage will train has fresh weights."""
    changes = {"size": given.size, "mean": given.mean, "std": given.std}
    if before is None:
        return load_teacher(
            given.teacher,
            source.class_names,
            weights=given.weights,
            columns=columns,
            trust_code=planner.trust_code,
            **cast("Any", changes),
        )
    assert before.train is not None
    assert before.source is not None
    recipe, classes = before.train, len(before.source.class_names)
    if classes != len(source.class_names):
        raise RecipeError(
            f"its source {source.name!r} has {len(source.class_names)} classes, but stage {before.name!r} "
            f"trains on {classes}: precompute the source that it trains on"
        )
    own = {"size": recipe.student_size, "mean": recipe.student_mean, "std": recipe.student_std}
    chosen = {name: own[name] if value is None else value for name, value in changes.items()}
    return build_network(recipe.student, classes, **cast("Any", chosen))


# Stages that evaluate several students.


def _plan_ensemble(planner: _Planner, config: StageConfig) -> Stage:
    given = config.ensemble
    assert given is not None
    names = [str(referenced(text)) for text in given.runs]
    if len(set(names)) < len(names):
        raise RecipeError(f"runs names a stage twice: {', '.join(names)}")
    members = [planner.stages[name] for name in names]
    first = members[0]
    assert first.train is not None
    assert first.evaluation is not None
    for other in members[1:]:
        assert other.evaluation is not None
        if other.evaluation.fingerprint != first.evaluation.fingerprint:
            raise RecipeError(
                f"stages {first.name!r} and {other.name!r} are evaluated on different data "
                f"({first.evaluation.name} and {other.evaluation.name}): give them the same evaluation"
            )
    return Stage(
        config.name,
        "ensemble",
        given.model_dump(mode="json"),
        tuple(names),
        {"evaluation": first.evaluation.fingerprint},
        evaluation=first.evaluation,
    )
