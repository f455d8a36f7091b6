"""Training runs: one student, or several on the same batches, from setup to finished folder."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coursepack.console import progress
from coursepack.data.loading import Renderer
from coursepack.distill.distributed import ALONE
from coursepack.distill.losses.base import Step
from coursepack.distill.runs.folder import (
    TENSORBOARD_FOLDER,
    ReadOnlyRunFolder,
    RunFolder,
    check_provenance,
    finished_metrics,
    fixed_provenance,
    recipe_to_resume,
)
from coursepack.distill.runs.tensorboard import MetricWriter, NoMetricWriter, check_tensorboard
from coursepack.distill.setup.prepare import describe_setup, prepare, provenance
from coursepack.distill.training.checkpoint import (
    CHECKPOINT_FILE,
    Position,
    check_identity,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from coursepack.distill.training.evaluate import evaluate, evaluation_view
from coursepack.distill.training.loop import check_targets, new_metrics, teachers_read, train_steps
from coursepack.distill.training.runtime import algorithms, generators_of, threads_of
from coursepack.distill.training.state import make_state
from coursepack.errors import RunError, TrainingDiverged
from coursepack.models.build import WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Self

    import torch

    from coursepack.distill.distributed import Ranks
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.setup.prepare import Setup
    from coursepack.distill.training.metrics import EpochMetrics
    from coursepack.distill.training.state import TrainState

CHECKPOINT_SECONDS = 60.0
"""Default time between checkpoints."""


@dataclass
class StudentRun:
    """Student in training, with its recipe, folder and progress."""

    recipe: TrainRecipe
    folder: RunFolder | ReadOnlyRunFolder
    state: TrainState
    writer: MetricWriter | NoMetricWriter
    position: Position
    log: EpochMetrics
    """Metrics of the current epoch."""
    identity: dict[str, Any]
    """Recipe and fingerprints of the data, with which a checkpoint must agree."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last completed epoch."""
    diverged: TrainingDiverged | None = None
    """Error that ended the run, if training diverged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Unlock the folder, and remove it if an error occurred before the first step."""
        self.folder.close(keep=kind is None or self.state.steps > 0)

    @property
    def is_finished(self) -> bool:
        """True after the last epoch, or when `patience` is exhausted."""
        patience = self.recipe.patience
        return self.position.epoch >= self.recipe.epochs or (
            patience is not None and self.position.stale >= patience
        )

    @property
    def is_over(self) -> bool:
        """True if the run is finished or has diverged."""
        return self.is_finished or self.diverged is not None

    def save(self) -> None:
        """Write a checkpoint."""
        save_checkpoint(self.folder.path, self.position, self.state, self.log, self.identity)

    def end_epoch(self, views: list[int], evaluation: dict[str, float] | None) -> None:
        """Log the metrics of an epoch, save the student if it is the best, and start the next epoch."""
        epoch = self.position.epoch
        train_metrics = self.log.means()
        group_names = train_metrics.keys() & {"teachers", "temperature"}
        groups: dict[str, Any] = {name: train_metrics.pop(name) for name in sorted(group_names)}
        _check_finite(train_metrics | (evaluation or {}), epoch, self.recipe)
        self.metrics = {
            "epoch": epoch,
            "view": views[0] if len(views) == 1 else views,
            "seconds": round(self.position.seconds, 6),
            "train": train_metrics,
            **({} if evaluation is None else {"evaluation": evaluation}),
            **groups,
        }
        self.folder.log(self.metrics)
        self.writer.log(self.metrics)
        best, stale = self.position.best, self.position.stale
        if evaluation is not None:
            if best is None or evaluation["accuracy"] > best:
                self.folder.keep_best(self.state.network)
                best, stale = evaluation["accuracy"], 0
            else:
                stale += 1
        self.position = Position(epoch + 1, best=best, stale=stale)
        self.log = new_metrics(self.state)


def train(
    recipe: TrainRecipe,
    out: Path,
    *,
    device: torch.device,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    tensorboard: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ranks: Ranks = ALONE,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Train one student into a run folder.

    Invalid input is refused before the folder is created, and the folder is removed if an error occurs before
    the first step. With several ranks, each calls this function with the rank and device that
    `process_group` returns; only the first rank writes.

    Args:
        recipe: the recipe.
        out: the run's folder.
        device: device to train on.
        overwrite: replace an existing run.
        resume: continue an interrupted run from its checkpoint, or start a new one if there is none.
        workers: number of processes that decode and render images, see `Renderer`.
        threads: number of threads of torch and the loss kernels; defaults to torch's current number.
        tensorboard: also write the metrics for TensorBoard.
        checkpoint_seconds: time between checkpoints; 0 means after every step.
        ranks: rank of this process.
        trust_code: allow stores to name Python code for live teachers.

    Returns:
        The metrics of the last epoch.

    Raises:
        RunBusy: another process is training into the folder.
        RunError: the folder is not empty, or holds a run that cannot be resumed with this recipe.
        TrainingDiverged: the loss is not finite; the run stays unfinished.
        Otherwise as `prepare`.
    """
    if resume:
        _check_same_on_all_ranks(
            ranks, out, [(out / name).is_file() for name in (WEIGHTS_FILE, CHECKPOINT_FILE)]
        )
    if resume and (metrics := finished_metrics(out, recipe)) is not None:
        ranks.log_once(f"{out} is finished: there is nothing to resume")
        return metrics
    resumed = recipe_to_resume(out, recipe) if resume else recipe
    with algorithms(deterministic=recipe.deterministic), threads_of(threads), generators_of(device):
        setup = prepare(resumed, device, ranks, trust_code=trust_code)
        with start_run(
            setup, recipe, out, overwrite=overwrite, resume=resume, tensorboard=tensorboard
        ) as run:
            ranks.log_once(describe_setup(setup))
            try:
                train_together(setup, [run], workers=workers, checkpoint_seconds=checkpoint_seconds)
            except KeyboardInterrupt:
                ranks.log_once(f"interrupted: the same command with --resume continues {out}")
                raise
    if run.diverged is not None:
        raise run.diverged
    return run.metrics


def start_run(
    setup: Setup, recipe: TrainRecipe, out: Path, *, overwrite: bool, resume: bool, tensorboard: bool
) -> StudentRun:
    """Start a run in a new folder, or restore it from its checkpoint.

    The result is a context manager that unlocks the folder.

    Raises:
        RunError, RunBusy, RecipeError, StoreDamaged: as `train`.
    """
    state = make_state(setup, recipe)
    if tensorboard:
        check_tensorboard()
    if setup.targets is not None and not (resume and (out / CHECKPOINT_FILE).is_file()):
        for view in setup.views_of_epoch(0):
            setup.targets.open(view, teachers_read([state], Step()))
    is_first = setup.ranks.is_first
    folder = RunFolder(out, overwrite=overwrite, resume=resume) if is_first else ReadOnlyRunFolder(out)
    try:
        return _start_in_folder(
            setup, recipe, folder, state, overwrite=overwrite, resume=resume, tensorboard=tensorboard
        )
    except BaseException:
        folder.close(keep=False)
        raise


def _start_in_folder(
    setup: Setup,
    recipe: TrainRecipe,
    folder: RunFolder | ReadOnlyRunFolder,
    state: TrainState,
    *,
    overwrite: bool,
    resume: bool,
    tensorboard: bool,
) -> StudentRun:
    """Start or restore a run in a folder that is already locked."""
    out, origin = folder.path, provenance(setup)
    identity = {"recipe": recipe.model_dump(mode="json"), **fixed_provenance(origin)}
    position, log = Position(), new_metrics(state)
    saved = load_checkpoint(out, setup.device) if resume else None
    if saved is not None:
        check_provenance(out, origin)
        check_identity(out, saved, identity)
        steps = setup.steps_per_epoch
        position = restore(out, saved, state, log, epochs=recipe.epochs, batches=steps)
    # No rank may write before all ranks have read the folder.
    _check_same_on_all_ranks(setup.ranks, out, None if saved is None else saved["position"])
    if saved is not None:
        if isinstance(folder, RunFolder):
            folder.reopen(position.epoch)
        setup.ranks.log_once(f"resuming {out} in epoch {position.epoch} after {position.batches} batches")
    elif isinstance(folder, RunFolder):
        folder.begin(recipe, origin, state.learner.network, overwrite=overwrite)
    state.broadcast_weights()
    first = position.epoch if resume else None
    writer = (
        MetricWriter(out / TENSORBOARD_FOLDER, first=first)
        if tensorboard and setup.ranks.is_first
        else NoMetricWriter()
    )
    return StudentRun(recipe, folder, state, writer, position, log, identity)


def _check_same_on_all_ranks(ranks: Ranks, out: Path, seen: object) -> None:
    """Check that all ranks see the same files.

    Raises:
        RunError: they do not, so they would start at different positions.
    """
    gathered = ranks.all_gather(seen)
    if any(other != gathered[0] for other in gathered):
        raise RunError(
            f"ranks see different checkpoints in {str(out)!r}: --out must be the same folder for all of "
            "them, for example on a shared file system"
        )


def train_together(
    setup: Setup, student_runs: Sequence[StudentRun], *, workers: int | None, checkpoint_seconds: float
) -> None:
    """Train students at the same position on one stream of batches, until all are finished or diverged.

    Each student is saved as soon as it is finished. A diverged one stays unfinished, with the error in
    `diverged`.
    """
    recipe, first = setup.recipe, student_runs[0].position
    states = [run.state for run in student_runs]
    total = len(setup.samples)
    done = first.epoch * total + _rows_before(setup, first)
    with ExitStack() as stack:
        title = f"train {', '.join(run.folder.path.name for run in student_runs)}"
        meter = stack.enter_context(
            progress(title, recipe.epochs * total, "samples", done=done, shown=setup.ranks.is_first)
        )
        pin, sizes = setup.device.type == "cuda", setup.sizes([state.learner.network for state in states])
        beside = pin and setup.images is None  # while the GPU trains, unless it renders
        renderer = stack.enter_context(
            Renderer(setup.source, recipe.view, sizes, workers=workers, pin=pin, background=beside)
        )
        evaluation_renderer = stack.enter_context(
            Renderer(
                setup.evaluation,
                evaluation_view(setup.evaluation),
                sizes,
                workers=workers,
                pin=pin,
                background=pin,
            )
        )
        for run in student_runs:
            stack.enter_context(run.writer)
        checkpoints = _Interval(checkpoint_seconds)
        while active := [run for run in student_runs if not run.is_over]:
            rows = len(setup.samples) - _rows_before(setup, active[0].position)
            _train_epoch(setup, active, renderer, checkpoints)
            if setup.targets is not None:
                setup.targets.check_unchanged()
            _evaluate(setup, active, evaluation_renderer)
            best = [run.position.best for run in active if run.position.best is not None]
            meter.advance(rows, f"best accuracy {max(best):.2%}" if best else "")
            for run in active:
                if run.is_finished:
                    run.folder.finish(run.state.network)


def _train_epoch(
    setup: Setup, active: Sequence[StudentRun], renderer: Renderer, checkpoints: _Interval
) -> None:
    """Train several students on the rest of an epoch, writing checkpoints when they are due."""
    epoch, first = active[0].position.epoch, active[0].position.batches
    before, started = [run.position.seconds for run in active], time.perf_counter()
    steps = train_steps(
        [run.state for run in active],
        renderer.ahead(setup.batches(epoch, first)),
        setup.targets,
        [run.log for run in active],
        epoch,
        micro_batches=setup.recipe.accumulate,
        first=first,
    )
    for batches in steps:
        spent = (time.perf_counter() - started) / len(active)
        for run, seconds in zip(active, before, strict=True):
            run.position.batches, run.position.seconds = batches, seconds + spent
        if setup.ranks.broadcast_flag(checkpoints.is_due()):
            for run in active:
                run.save()


def _evaluate(setup: Setup, active: Sequence[StudentRun], renderer: Renderer) -> None:
    """End an epoch of several students, with an evaluation if it is due."""
    epoch, recipe = active[0].position.epoch, setup.recipe
    is_due = (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs
    for run in active:
        network = run.state.network
        evaluation = None
        if is_due:
            evaluation = evaluate(
                network, setup.evaluation, setup.device, renderer=renderer, ranks=setup.ranks
            )
        try:
            run.end_epoch(setup.views_of_epoch(epoch), evaluation)
        except TrainingDiverged as error:
            check_targets(setup.targets, setup.views_of_epoch(epoch))
            run.diverged = error


def _rows_before(setup: Setup, position: Position) -> int:
    """Return the number of samples of the epoch that are completed at a position."""
    return min(
        len(setup.samples), position.batches * (setup.recipe.batch_size // setup.recipe.views_per_load)
    )


class _Interval:
    """Timer that is due every given number of seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, time.monotonic()

    def is_due(self) -> bool:
        """Return true, and restart the timer, if the interval has passed."""
        if time.monotonic() - self._since < self._seconds:
            return False
        self._since = time.monotonic()
        return True


def _check_finite(metrics: dict[str, float], epoch: int, recipe: TrainRecipe) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"training diverged in epoch {epoch}: {name} is {value}. Use a smaller --lr than "
                f"{recipe.optimizer.lr:g}. The unfinished run stays in its folder: remove it, or replace it "
                "with --overwrite."
            )
