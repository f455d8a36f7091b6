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
from coursepack.data.sources import subset
from coursepack.data.store import StoreReader
from coursepack.data.store.manifest import LOGITS
from coursepack.distill.evaluate import evaluate
from coursepack.distill.learner import Learner
from coursepack.distill.objective import Objective
from coursepack.distill.run_folder import RunFolder, check_free
from coursepack.distill.targets import (
    CachedTargets,
    OnlineTargets,
    choose_reading,
    free_memory,
    live_teachers,
    open_stores,
)
from coursepack.errors import RecipeError, StoreMismatch, TeacherMismatch, TrainingDiverged
from coursepack.models import build_network

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

    def view_of_epoch(self, epoch: int) -> int:
        """The view that every sample of an epoch is seen under."""
        return epoch if self.views is None else self.views[epoch % len(self.views)]

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; tells the targets what will be needed next."""
        view = self.view_of_epoch(epoch)
        order = epoch_order(self.samples, seed=self.recipe.seed, epoch=epoch, window=self.window)
        done, announced = 0, 0
        for batch in batches(
            self.source,
            self.recipe.view,
            order,
            view=view,
            batch_size=self.recipe.batch_size,
            device=self.device,
        ):
            if self.targets is not None and self.window is not None and done >= announced:
                announced = done + self.window.rows
                self.targets.will_need(view, order[announced : announced + self.window.rows])
            if self.targets is not None and done == 0:
                self.targets.prefetch(self.view_of_epoch(epoch + 1))
            yield batch
            done += len(batch)

    def trainee(self) -> Trainee:
        """A fresh student of the recipe."""
        recipe = self.recipe
        classes = len(self.source.class_names)
        network = build_network(recipe.student, classes, seed=recipe.seed, size=recipe.student_size)
        learner = Learner(network, Objective(recipe.objective)).to(self.device)
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
    if objective.arrays and not recipe.stores:
        raise RecipeError(f"method {recipe.method!r} needs teachers: give at least one --store")
    if recipe.stores and not objective.arrays:
        raise RecipeError(
            f"method {recipe.method!r} does not use teachers, but --store {recipe.stores[0]} is given: leave "
            "--store out, or choose a method that learns from them, as --method kd"
        )
    readers = open_stores(recipe.stores) if recipe.stores else []
    views = None if recipe.views is None else tuple(range(recipe.views))
    if readers:
        _check_stores(recipe, source, readers)
        views = _common_views(recipe, readers)
        reading = choose_reading(readers, free_memory()) if recipe.reading == "auto" else recipe.reading
        readers = [StoreReader(reader.path, reading) for reader in readers]
        for reader in readers:
            reader.pinned = device.type == "cuda"
    weights = objective.teacher_weights
    if weights is not None and len(weights) != len(readers):
        raise RecipeError(
            f"teacher_weights has {len(weights)} numbers, expected {len(readers)}: one per store"
        )
    targets: TargetsKind | None = None
    if readers and recipe.online:
        targets = OnlineTargets(live_teachers(readers, device))
    elif readers:
        targets = CachedTargets(readers, device)
    elif recipe.online:
        raise RecipeError("--online runs the teachers of stores live: give at least one --store")
    window = None
    if readers and readers[0].reading == "windowed":
        chunk_rows = max(reader.chunk_rows([LOGITS]) for reader in readers)
        window = Window(chunk_rows, max(WINDOW_CHUNKS, -(-WINDOW_ROWS // chunk_rows)))
    samples = subset(source, recipe.limit)
    return Run(recipe, source, evaluation, samples, views, targets, tuple(readers), window, device)


def train(recipe: TrainRecipe, out: Path, *, device: torch.device, overwrite: bool = False) -> dict[str, Any]:
    """Train one student into a run folder.

    Everything that can be refused is refused before the folder is made.

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
    check_free(out, overwrite=overwrite)
    folder = RunFolder(out, recipe, provenance(run), trainee.learner.network)
    say(_opening(run))
    metrics: dict[str, Any] = {}
    with progress(f"train {out.name}", recipe.epochs * len(run.samples), "samples") as meter:
        for epoch in range(recipe.epochs):
            started = time.perf_counter()
            train_metrics = train_epoch([trainee], run.batches(epoch), run.targets)[0]
            seconds = time.perf_counter() - started
            evaluation = evaluate(trainee.learner, run.evaluation, device)
            _check_finite(train_metrics | evaluation, epoch, recipe)
            metrics = {
                "epoch": epoch,
                "view": run.view_of_epoch(epoch),
                "seconds": round(seconds, 6),
                "train": train_metrics,
                "evaluation": evaluation,
            }
            folder.log(metrics)
            meter.advance(len(run.samples), f"accuracy {evaluation['accuracy']:.2%}")
    folder.finish(trainee.learner.network)
    return metrics


def train_epoch(
    trainees: Sequence[Trainee], batches: Iterable[Batch], targets: TargetsKind | None
) -> list[dict[str, float]]:
    """One pass of every trainee over the same batches; returns each one's mean loss, terms and accuracy."""
    logs = [_EpochLog() for _ in trainees]
    for trainee in trainees:
        trainee.learner.train()
    for batch in batches:
        fetched = None if targets is None else targets.fetch(batch)
        for trainee, log in zip(trainees, logs, strict=True):
            output = trainee.learner(batch, fetched)
            trainee.optimiser.zero_grad(set_to_none=True)
            output.value.loss.backward()
            trainee.optimiser.step()
            log.add(output, batch)
    return [log.means() for log in logs]


def make_optimiser(learner: Learner, config: OptimiserConfig) -> torch.optim.Optimizer:
    """SGD over everything the learner trains."""
    return torch.optim.SGD(
        learner.parameters(),
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
    }


class _EpochLog:
    """Means over an epoch, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self._samples = 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, output: Any, batch: Batch) -> None:
        count = len(batch)
        correct = (output.student_logits.detach().argmax(1) == batch.labels).sum()
        values = {"loss": output.value.loss.detach() * count, "accuracy": correct}
        values |= {name: value * count for name, value in output.value.terms.items()}
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._samples += count

    def means(self) -> dict[str, float]:
        return {name: float(value) / self._samples for name, value in self._sums.items()}


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


def _common_views(recipe: TrainRecipe, readers: Sequence[StoreReader]) -> tuple[int, ...]:
    common = sorted(set.intersection(*(set(reader.views) for reader in readers)))
    if not common:
        raise StoreMismatch("the stores have no committed view in common: finish them with `precompute run`")
    if recipe.views is not None and recipe.views > len(common):
        raise RecipeError(
            f"views is {recipe.views}, but the stores have {len(common)} views in common: leave --views out, "
            f"or add views with `precompute run ... --views {recipe.views}`"
        )
    return tuple(common[: recipe.views])


def _opening(run: Run) -> str:
    recipe = run.recipe
    teachers = ", ".join(reader.name for reader in run.readers)
    said = f"{recipe.student} on {len(run.samples):,} samples of {run.source.name}, method {recipe.method}"
    if run.readers:
        how = "live" if recipe.online else f"from their stores ({run.readers[0].reading})"
        said += f", teachers {teachers} {how}"
    if run.views is None:
        return f"{said}; a new view every epoch"
    repeats = "" if recipe.epochs <= len(run.views) else f", each seen again after {len(run.views)} epochs"
    return f"{said}; {len(run.views)} views in turn, one per epoch{repeats}"
