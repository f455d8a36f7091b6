"""A chain file resolved: every stage's recipe complete and checked before the first one runs.

Stores that stages will write do not exist yet. Their manifests follow from the recipes alone, without files,
so stages that read them are checked against these as they would be against the stores.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from coursepack.config import parse_config
from coursepack.data import ViewRecipe, open_source, view_fingerprint, view_recipe
from coursepack.data.encodings import FOR_FEATURES, FOR_LOGITS, parse_encoding, smaller_encoding
from coursepack.data.store import StorePlan, StoreReader
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.planning import fresh_manifest
from coursepack.data.views import stored_view
from coursepack.distill.losses import LOSSES
from coursepack.distill.runs.chain.file import STAGE, read_chain, referenced, train_values
from coursepack.distill.setup.build import build_student
from coursepack.distill.setup.checks import check_evaluation, check_recipe, check_student, check_views
from coursepack.distill.setup.requirements import check_needs, term_pairs
from coursepack.distill.setup.resolve import resolve_recipe
from coursepack.distill.targets.base import FEATURES
from coursepack.distill.targets.stores import common_views, open_stores
from coursepack.distill.targets.teacher_stores import check_store
from coursepack.errors import CoursepackError, RecipeError
from coursepack.imports import check_trusted
from coursepack.models import TeacherRunner, build_network, load_teacher, parse_tap
from coursepack.models.build import weights_fingerprint
from coursepack.models.classes import load_columns
from coursepack.models.taps import tap_from_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from coursepack.data import Source
    from coursepack.data.store import Manifest
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.chain.file import ChainConfig, PrecomputeConfig, StageConfig
    from coursepack.models import Network

ONLY_OF_RUNS = ("weights", "classes")
"""Fields of `precompute` that a student of the same chain has no use for."""


@dataclass(frozen=True)
class PlannedStore:
    """Store that a stage will write, in the place of its reader."""

    path: Path
    """Reference to the stage, `stage:NAME`."""
    manifest: Manifest
    class_ids: NDArray[np.int64]

    @property
    def address(self) -> str:
        """Reference to the stage, in the place of the address of a store."""
        return str(self.path)

    @property
    def name(self) -> str:
        """Name of the stage."""
        return str(self.path).removeprefix(STAGE)

    def labels(self) -> NDArray[np.int64]:
        """Return the labels of all samples `(N,)`."""
        return self.class_ids


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
    _check_views(recipe, readers)
    student = build_student(recipe, source)
    check_student(student, source)
    if readers:
        _check_arrays(recipe, readers, student)
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


def stored_output(manifest: Manifest) -> dict[str, Any]:
    """Return what determines the values that a store holds: its fingerprint, and its arrays and views."""
    arrays = {
        name: f"{array.encoding.name}, {len(manifest.committed.get(name, ()))} views"
        for name, array in manifest.arrays.items()
    }
    return {"fingerprint": manifest.fingerprint, "arrays": arrays}


def _reader(planner: _Planner, text: str) -> StoreReader:
    """Return the reader of a store, or what stands for it until its stage has written it."""
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


def _check_views(recipe: TrainRecipe, readers: Sequence[StoreReader]) -> None:
    """Check the number of views that a stage trains on, which its stores must have."""
    views = [] if recipe.views is None else list(range(recipe.views))
    if readers:
        planned = [reader.manifest.views for reader in readers if isinstance(reader, PlannedStore)]
        existing = [reader for reader in readers if not isinstance(reader, PlannedStore)]
        common = [len(common_views(existing, [[] for _ in existing]))] if existing else []
        stored = [*planned, *common]
        if recipe.views is not None and recipe.views > min(stored):
            raise RecipeError(
                f"views is {recipe.views}, but its stores have {min(stored)}: leave views out, or give the "
                f"stages that write them views: {recipe.views}"
            )
        views = views or list(range(min(stored)))
    if views:
        check_views(recipe, views)


def _is_wrapped(recipe: TrainRecipe) -> bool:
    """Return true if a term wraps the student, so that its layers are known only with its store."""
    return any(LOSSES[term.term].wrap is not None for term in recipe.objective.all_terms().values())


def _check_arrays(recipe: TrainRecipe, readers: Sequence[StoreReader], student: Network) -> None:
    """Check that the stores of earlier stages will hold the logits and features that a method reads."""
    dense = recipe.objective.needs().dense_logits
    for reader in readers:
        encoding = reader.manifest.arrays[LOGITS].encoding.name
        if dense and isinstance(reader, PlannedStore) and encoding.startswith("topk"):
            raise RecipeError(
                f"method {recipe.method!r} ({dense}) needs all logits, but stage {reader.name!r} stores only "
                f"the largest ({encoding}): give it encoding: float16"
            )
    pairs = term_pairs(recipe.objective, [reader.manifest for reader in readers], student)
    for index, tap, _ in (pair for of_term in pairs.values() for pair in of_term):
        reader = readers[index]
        if isinstance(reader, PlannedStore) and f"{FEATURES}{tap}" not in reader.manifest.arrays:
            raise RecipeError(
                f"method {recipe.method!r} needs features that stage {reader.name!r} does not store: give "
                f"it taps: [{tap_from_name(tap).text!r}]"
            )


# Stages that precompute.


def _plan_precompute(planner: _Planner, config: StageConfig) -> Stage:
    given = config.precompute
    assert given is not None
    before = planner.stages.get(referenced(given.teacher) or "")
    values = given.model_dump(mode="json")
    if before is not None:
        assert before.train is not None
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
    manifest = _planned_manifest(given, planner, source, view, network, columns, values["root"])
    return Stage(
        config.name,
        "precompute",
        values,
        () if before is None else (before.name,),
        fixed,
        source=source,
        store=PlannedStore(Path(f"{STAGE}{config.name}"), manifest, source.labels),
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
    columns: Sequence[int] | None,
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


def _planned_manifest(
    given: PrecomputeConfig,
    planner: _Planner,
    source: Source,
    view: ViewRecipe,
    network: Network,
    columns: Sequence[int] | None,
    root: str | None,
) -> Manifest:
    """Return the manifest that the store of a stage will have, but for its teacher's weights."""
    before = planner.stages.get(referenced(given.teacher) or "")
    taps = [parse_tap(tap) for tap in given.taps]
    if before is not None and before.network is None:
        taps = []  # layers of a wrapped student are not known yet
    runner = TeacherRunner(network, taps, planner.device, columns, precision=given.precision)
    shapes = runner.row_shapes(source.channels)
    features = parse_encoding(given.feature_encoding, FOR_FEATURES)
    logits = smaller_encoding(parse_encoding(given.encoding, FOR_LOGITS), shapes[LOGITS])
    arrays = {LOGITS: (logits, shapes[LOGITS])}
    for tap in runner.taps:
        encoding = parse_encoding("bits") if tap.reduction == "sign" else features
        arrays[f"{FEATURES}{tap.name}"] = (encoding, shapes[f"{FEATURES}{tap.name}"])
    identity: Mapping[str, Any] = {
        "teacher": {
            "network": network.spec,
            "weights": "",
            "preprocessing": network.preprocessing.model_dump(mode="json"),
            "columns": columns,
        },
        "view": {
            "recipe": view.model_dump(mode="json"),
            "fingerprint": view_fingerprint(view, source),
        },
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "precision": given.precision,
    }
    return fresh_manifest(
        StorePlan(
            identity=dict(identity),
            origin={"root": None if root is None else str(Path(root).expanduser().absolute())},
            labels=source.labels,
            class_names=source.class_names,
            views=given.views,
            arrays=arrays,
            static={name: value.numpy() for name, value in runner.static().items()},
            block_rows=given.block_rows,
        )
    )


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
