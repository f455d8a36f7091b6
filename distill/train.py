"""The training loop: learners on one stream of batches, with targets or without."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coursepack.canonical import difference_table
from coursepack.console import progress, say
from coursepack.data import batches, epoch_order, open_source, view_fingerprint
from coursepack.data.batches import Window
from coursepack.data.drift import drift
from coursepack.data.loading import Renderer, device_images
from coursepack.data.sources import subset
from coursepack.data.store import StoreReader
from coursepack.data.store.manifest import LOGITS
from coursepack.distill.board import Board, NoBoard, check_tensorboard
from coursepack.distill.building import build_arrays, build_objective, build_student
from coursepack.distill.epoch_log import EpochLog
from coursepack.distill.evaluate import evaluate, evaluation_view
from coursepack.distill.facts import Moment
from coursepack.distill.learner import Learner
from coursepack.distill.needs import check_objective
from coursepack.distill.run_folder import RunFolder, check_free
from coursepack.distill.schedule import is_used
from coursepack.distill.targets import (
    CachedTargets,
    OnlineTargets,
    choose_reading,
    free_memory,
    live_teachers,
    open_stores,
)
from coursepack.errors import RecipeError, StoreMismatch, TeacherMismatch, TrainingDiverged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from coursepack.data import Batch, Source
    from coursepack.data.randomness import Samples
    from coursepack.distill.recipe import OptimiserConfig, TrainRecipe
    from coursepack.distill.targets import TargetsKind


WINDOW_CHUNKS = 16
WINDOW_ROWS = 8192
"""A window holds at least this many chunks and rows, so that batches are well mixed."""


@dataclass
class Trainee:
    """A learner and what updates it."""

    learner: Learner
    optimiser: torch.optim.Optimizer


@dataclass(frozen=True)
class Run:
    """Everything a recipe describes, opened and checked, before the first step."""

    recipe: TrainRecipe
    source: Source
    evaluation: Source
    samples: Samples
    views: tuple[int, ...] | None
    """Views taken in turn, one per epoch; None means epoch e takes view e."""
    targets: TargetsKind | None
    readers: tuple[StoreReader, ...]
    window: Window | None
    """How samples are ordered when the stores do not fit into memory."""
    device: torch.device
    drift: tuple[str, ...] = ()
    """What the stores' views are no longer, where that was allowed."""
    images: torch.Tensor | None = None
    """The source's images on the device, where views are rendered there."""

    def views_of_epoch(self, epoch: int) -> list[int]:
        """The views that every sample of an epoch is seen under."""
        each = self.recipe.views_per_load
        turns = range(epoch * each, (epoch + 1) * each)
        return [turn if self.views is None else self.views[turn % len(self.views)] for turn in turns]

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; tells the targets what will be needed next."""
        views = self.views_of_epoch(epoch)
        order = epoch_order(self.samples, seed=self.recipe.seed, epoch=epoch, window=self.window)
        done, announced = 0, 0
        for batch in batches(
            self.source,
            self.recipe.view,
            order,
            views=views,
            batch_size=self.recipe.batch_size,
            device=self.device,
            images=self.images,
        ):
            if self.targets is not None and self.window is not None and done >= announced:
                announced = done + self.window.rows
                for view in views:
                    self.targets.will_need(view, order[announced : announced + self.window.rows])
            if self.targets is not None and done == 0:
                for view in self.views_of_epoch(epoch + 1):
                    self.targets.prefetch(view)
            yield batch
            done += len(batch) // len(views)

    def sizes(self, trainees: Sequence[Trainee]) -> list[int]:
        """Sides in pixels at which the views of a run are needed."""
        sizes = {trainee.learner.network.preprocessing.size for trainee in trainees}
        if isinstance(self.targets, OnlineTargets):
            sizes |= {runner.network.preprocessing.size for runner in self.targets.runners}
        return sorted(sizes)

    def trainee(self) -> Trainee:
        """A fresh student of the recipe."""
        return self.trainee_with(self.recipe)

    def trainee_with(self, recipe: TrainRecipe) -> Trainee:
        """A fresh student of another recipe on the same batches and targets."""
        student = build_student(recipe, self.source)
        objective = build_objective(recipe, self.source, self.readers, student)
        learner = Learner(student, objective).to(self.device)
        return Trainee(learner, make_optimiser(learner, recipe.optimiser))


def prepare(recipe: TrainRecipe, device: torch.device) -> Run:
    """Open what a recipe names, and refuse what cannot be trained.

    Raises:
        StoreMismatch: stores of different views or sources, or of another source than the recipe's.
        StoreNotFound, StoreIncomplete, StoreDamaged: a store that cannot be read.
        SourceError: a source's files are missing or damaged.
        RecipeError, UnknownName: fields that do not fit together.
    """
    root = None if recipe.root is None else Path(recipe.root)
    source, evaluation = open_source(recipe.source, root), open_source(recipe.evaluation, root)
    source.check()
    evaluation.check()
    objective = recipe.objective
    _check_mixing(recipe)
    if recipe.views_per_load > recipe.batch_size:
        raise RecipeError(
            f"views_per_load is {recipe.views_per_load}, but batch_size is {recipe.batch_size}: a batch has "
            "to hold every view of at least one sample"
        )
    if objective.needs_teachers and not recipe.stores:
        raise RecipeError(f"method {recipe.method!r} needs teachers: give at least one --store")
    if recipe.stores and not objective.needs_teachers:
        raise RecipeError(
            f"method {recipe.method!r} does not use teachers, but --store {recipe.stores[0]} is given: leave "
            "--store out, or choose a method that learns from them, as --method kd"
        )
    readers = open_stores(recipe.stores) if recipe.stores else []
    arrays: list[list[str]] = []
    views = None if recipe.views is None else tuple(range(recipe.views))
    if readers:
        _check_stores(recipe, source, readers)
        check_objective(recipe, readers)
        arrays = build_arrays(recipe, source, readers)
        views = _common_views(recipe, readers, arrays)
        reading = recipe.reading
        if reading == "auto":
            reading = choose_reading(readers, free_memory(), arrays)
        readers = [StoreReader(reader.path, reading) for reader in readers]
        for reader in readers:
            reader.pinned = device.type == "cuda"
    targets: TargetsKind | None = None
    if readers and recipe.online:
        targets = OnlineTargets(live_teachers(readers, arrays, device))
    elif readers:
        targets = CachedTargets(readers, device, arrays)
    elif recipe.online:
        raise RecipeError("--online runs the teachers of stores live: give at least one --store")
    window = None
    if readers and readers[0].reading == "windowed":
        chunk_rows = max(
            reader.chunk_rows(names) for reader, names in zip(readers, arrays, strict=True) if names
        )
        window = Window(chunk_rows, max(WINDOW_CHUNKS, -(-WINDOW_ROWS // chunk_rows)))
    drifted: list[str] = []
    for reader in readers:
        drifted += _check_drift(recipe, source, reader, views or ())
    return Run(
        recipe,
        source,
        evaluation,
        subset(source, recipe.limit),
        views,
        targets,
        tuple(readers),
        window,
        device,
        tuple(drifted),
        device_images(source, recipe.view, device),
    )


def train(
    recipe: TrainRecipe,
    out: Path,
    *,
    device: torch.device,
    overwrite: bool = False,
    workers: int | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train one student into a run folder.

    Everything that can be refused is refused before the folder is made.

    Args:
        recipe: what to train.
        out: the run's folder.
        device: where to train.
        overwrite: replace a run that is there.
        workers: processes that decode and render, see `Renderer`.
        tensorboard: write the metrics for TensorBoard too.

    Returns:
        The metrics of the last epoch.

    Raises:
        RunError: the folder is not free.
        TrainingDiverged: the loss is no longer finite; the run stays unfinished.
        Otherwise as `prepare`.
    """
    run = prepare(recipe, device)
    trainee = run.trainee()
    _check_student(trainee.learner, run.source)
    if tensorboard:
        check_tensorboard()
    check_free(out, overwrite=overwrite)
    folder = RunFolder(out, recipe, provenance(run), trainee.learner.network)
    say(_opening(run))
    metrics: dict[str, Any] = {}
    pin, size = device.type == "cuda", trainee.learner.network.preprocessing.size
    renderer = Renderer(run.source, recipe.view, run.sizes([trainee]), workers=workers, pin=pin)
    looking = Renderer(run.evaluation, evaluation_view(run.evaluation), [size], workers=workers, pin=pin)
    total = recipe.epochs * len(run.samples)
    board = Board(out / "tensorboard") if tensorboard else NoBoard()
    with progress(f"train {out.name}", total, "samples") as meter, renderer, looking, board:
        for epoch in range(recipe.epochs):
            started = time.perf_counter()
            train_metrics = train_epoch([trainee], renderer.ahead(run.batches(epoch)), run.targets, epoch)[0]
            seconds = time.perf_counter() - started
            evaluation = evaluate(trainee.learner, run.evaluation, device, renderer=looking)
            told = train_metrics.keys() & {"teachers", "temperature"}
            groups: dict[str, Any] = {name: train_metrics.pop(name) for name in sorted(told)}
            _check_finite(train_metrics | evaluation, epoch, recipe)
            views = run.views_of_epoch(epoch)
            metrics = {
                "epoch": epoch,
                "view": views[0] if len(views) == 1 else views,
                "seconds": round(seconds, 6),
                "train": train_metrics,
                "evaluation": evaluation,
                **groups,
            }
            folder.log(metrics)
            board.log(metrics)
            meter.advance(len(run.samples), f"accuracy {evaluation['accuracy']:.2%}")
    folder.finish(trainee.learner.network)
    return metrics


def train_epoch(
    trainees: Sequence[Trainee], batches: Iterable[Batch], targets: TargetsKind | None, epoch: int = 0
) -> list[dict[str, Any]]:
    """One pass of every trainee over the same batches; returns what each one's `EpochLog` tells."""
    logs = [EpochLog(trainee.learner.objective.setting.fusion.teachers) for trainee in trainees]
    for trainee in trainees:
        trainee.learner.train()
        trainee.learner.begin_epoch(epoch)
    for number, batch in enumerate(batches):
        moment = Moment(epoch, number)
        fetched = None if targets is None else targets.fetch(batch, _asked(trainees, moment))
        for trainee, log in zip(trainees, logs, strict=True):
            output = trainee.learner(batch, fetched, moment)
            trainee.optimiser.zero_grad(set_to_none=True)
            output.value.loss.backward()
            trainee.optimiser.step()
            log.add(output, batch)
    return [log.means() for log in logs]


def _asked(trainees: Sequence[Trainee], moment: Moment) -> list[int] | None:
    """Places of the teachers that any of the trainees asks for a batch; None means all."""
    chosen = {trainee.learner.objective.chosen_teacher(moment) for trainee in trainees}
    places = [place for place in chosen if place is not None]
    return sorted(places) if len(places) == len(chosen) else None


def make_optimiser(learner: Learner, config: OptimiserConfig) -> torch.optim.Optimizer:
    """SGD over everything the learner trains; the fusion's latents have an L2 penalty of their own."""
    latents = learner.objective.fusion_parameters()
    own = {id(value) for value in latents}
    rest = [value for value in learner.parameters() if id(value) not in own]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if latents:
        groups.append({"params": latents, "weight_decay": 0.0})
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )


def provenance(run: Run) -> dict[str, Any]:
    """Where a run's targets came from, and what ran it."""
    stores = [
        {
            "path": str(reader.path.resolve()),
            "fingerprint": reader.manifest.fingerprint,
            "views": list(reader.views),
            "reading": reader.reading,
            "encoding": reader.manifest.arrays["logits"].encoding.to_dict(),
        }
        for reader in run.readers
    ]
    return {
        "stores": stores,
        "view_fingerprint": view_fingerprint(run.recipe.view, run.source),
        "source_fingerprint": run.source.fingerprint,
        "versions": {name: version(name) for name in ("coursepack", "torch", "torchvision", "numpy")},
        "device": str(run.device),
        "drift": list(run.drift),
    }


def _check_student(learner: Learner, source: Source) -> None:
    """Run one black image, so that a student that cannot look at the source is refused before the run."""
    network = learner.network
    size, device = network.preprocessing.size, next(learner.parameters()).device
    pixels = torch.zeros(1, size, size, source.channels, dtype=torch.uint8, device=device)
    learner.eval()
    try:
        with torch.inference_mode():
            shape = tuple(learner.student(network.preprocessing(pixels)).shape)
    except RuntimeError as error:
        raise RecipeError(
            f"student {network.spec!r} cannot take views of {size} x {size} pixels: {error}. Choose another "
            "student_size, or leave it out"
        ) from error
    if shape != (1, network.classes):
        raise RecipeError(
            f"student {network.spec!r} gives logits of shape {shape}, expected {(1, network.classes)} (N, C)"
        )


def _check_finite(metrics: dict[str, float], epoch: int, recipe: TrainRecipe) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"training diverged in epoch {epoch}: {name} is {value}. Use a smaller --lr than "
                f"{recipe.optimiser.lr:g}, and --overwrite what is left of the run."
            )


def _check_stores(recipe: TrainRecipe, source: Source, readers: Sequence[StoreReader]) -> None:
    for reader in readers:
        identity = reader.manifest.identity
        if identity["source"]["fingerprint"] != source.fingerprint:
            raise StoreMismatch(
                f"store {str(reader.path)!r} was written from source {identity['source']['name']!r} "
                f"({identity['source']['fingerprint'][:12]}), but {source.name!r} here is "
                f"{source.fingerprint[:12]}: train on the source that the teachers saw"
            )
        if identity["view"]["fingerprint"] != view_fingerprint(recipe.view, source):
            ours = recipe.view.model_dump(mode="json")
            table = difference_table(identity["view"]["recipe"], ours, "store", "recipe")
            raise StoreMismatch(
                f"store {str(reader.path)!r} was written with another view recipe than this run's.\n{table}\n"
                "Leave the view out, and the store's own is used."
            )
        if len(reader.manifest.class_names) != len(source.class_names):
            raise TeacherMismatch(
                f"store {str(reader.path)!r} has {len(reader.manifest.class_names)} classes, but source "
                f"{source.name!r} has {len(source.class_names)}"
            )


def _check_mixing(recipe: TrainRecipe) -> None:
    """Partners come from the whole split: a student that may know few labels must not learn theirs."""
    objective = recipe.objective
    hard = not objective.needs_teachers or is_used(objective.hard_weight)
    if recipe.view.mix is not None and recipe.limit is not None and hard:
        raise RecipeError(
            f"limit is {recipe.limit}, but the view mixes in samples of the whole split, whose labels would "
            "be learned too: give --hard-weight 0 with teachers, a view without mix, or leave --limit out"
        )


def _check_drift(recipe: TrainRecipe, source: Source, reader: StoreReader, views: Sequence[int]) -> list[str]:
    found = drift(reader.manifest, source, recipe.view, views)
    if found and not recipe.allow_drift:
        shown = "\n".join(f"  {line}" for line in found[:8])
        written = next(iter(reader.manifest.view_records.values()))["environments"]
        raise StoreMismatch(
            f"store {str(reader.path)!r} was written from other views than this version makes:\n{shown}\n"
            f"{len(found)} of what was looked at differ. It was written with {written}. Install those "
            "versions, run `precompute run` again into a new store, or train all the same with "
            "--allow-drift, which the run will say."
        )
    return [f"{reader.name}: {line}" for line in found]


def _common_views(
    recipe: TrainRecipe, readers: Sequence[StoreReader], arrays: Sequence[Sequence[str]]
) -> tuple[int, ...]:
    needed = [list(dict.fromkeys([LOGITS, *names])) for names in arrays]
    committed = [
        reader.manifest.committed_views(names) for reader, names in zip(readers, needed, strict=True)
    ]
    common = sorted(set.intersection(*map(set, committed)))
    if not common:
        raise StoreMismatch("the stores have no committed view in common: finish them with `precompute run`")
    if recipe.views is not None and recipe.views > len(common):
        raise RecipeError(
            f"views is {recipe.views}, but the stores have {len(common)} views in common: leave --views out, "
            f"or add views with `precompute run ... --views {recipe.views}`"
        )
    chosen = tuple(common[: recipe.views])
    if recipe.views_per_load > len(chosen):
        raise RecipeError(
            f"views_per_load is {recipe.views_per_load}, but the run has {len(chosen)} views: a batch would "
            "hold a view of a sample twice"
        )
    return chosen


def _opening(run: Run) -> str:
    recipe = run.recipe
    teachers = ", ".join(reader.name for reader in run.readers)
    said = f"{recipe.student} on {len(run.samples):,} samples of {run.source.name}, method {recipe.method}"
    if run.readers:
        how = "live" if recipe.online else f"from their stores ({run.readers[0].reading})"
        said += f", teachers {teachers} {how}"
    if run.views is None:
        return f"{said}; a new view every epoch"
    each = recipe.views_per_load
    round_trip = -(-len(run.views) // each)
    repeats = "" if recipe.epochs <= round_trip else f", each seen again after {round_trip} epochs"
    per_epoch = "one" if each == 1 else f"{each} of every sample"
    return f"{said}; {len(run.views)} views in turn, {per_epoch} per epoch{repeats}"
