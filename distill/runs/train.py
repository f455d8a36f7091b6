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
    BOARD_FOLDER,
    OthersFolder,
    RunFolder,
    as_begun,
    check_begun,
    finished_metrics,
    lasting,
)
from coursepack.distill.runs.tensorboard import Board, NoBoard, check_tensorboard
from coursepack.distill.setup.prepare import opening, prepare, provenance
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


@dataclass
class StudentRun:
    """One student in training: its recipe, its folder, and its position."""

    recipe: TrainRecipe
    folder: RunFolder | OthersFolder
    state: TrainState
    board: Board | NoBoard
    position: Position
    log: EpochMetrics
    identity: dict[str, Any]
    """What a checkpoint of it is bound to: the recipe, and the fingerprints of what it reads."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Of the last epoch."""
    diverged: TrainingDiverged | None = None
    """Why it cannot go on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give up the folder, and remove it if the run did no step."""
        self.folder.close(keep=kind is None or self.state.steps > 0)

    @property
    def is_finished(self) -> bool:
        """Whether it has had its last epoch."""
        patience = self.recipe.patience
        return self.position.epoch >= self.recipe.epochs or (
            patience is not None and self.position.stale >= patience
        )

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.is_finished or self.diverged is not None

    def save(self) -> None:
        """Write a checkpoint."""
        save_checkpoint(self.folder.path, self.position, self.state, self.log, self.identity)

    def end_epoch(self, views: list[int], evaluation: dict[str, float] | None) -> None:
        """Log an epoch, keep the student if it is the best so far, and go on to the next."""
        epoch = self.position.epoch
        train_metrics = self.log.means()
        told = train_metrics.keys() & {"teachers", "temperature"}
        groups: dict[str, Any] = {name: train_metrics.pop(name) for name in sorted(told)}
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
        self.board.log(self.metrics)
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

    Everything that can be refused is refused before the folder is made, and none stays of a run that did no
    step. Several ranks call it alike, with what `joined` gives each; the first alone writes.

    Args:
        recipe: what to train.
        out: the run's folder.
        device: where to train.
        overwrite: replace a run that is there.
        resume: go on with a run that was interrupted, from its checkpoint; begin it where there is none.
        workers: processes that decode and render, see `Renderer`.
        threads: of torch and the kernels; None means as many as torch has, see `machine`.
        tensorboard: write the metrics for TensorBoard too.
        checkpoint_seconds: time between checkpoints; 0 means after every step.
        ranks: who trains it together.
        trust_code: run live teachers even if their stores name Python code for them.

    Returns:
        The metrics of the last epoch.

    Raises:
        RunBusy: another process trains into the folder.
        RunError: the folder is not free, or holds a run that cannot be resumed with this recipe.
        TrainingDiverged: the loss is no longer finite; the run stays unfinished.
        Otherwise as `prepare`.
    """
    if resume:
        _check_all_see(ranks, out, [(out / name).is_file() for name in (WEIGHTS_FILE, CHECKPOINT_FILE)])
    if resume and (metrics := finished_metrics(out, recipe)) is not None:
        ranks.say(f"{out} is finished: there is nothing to resume")
        return metrics
    begun = as_begun(out, recipe) if resume else recipe
    with algorithms(deterministic=recipe.deterministic), threads_of(threads), generators_of(device):
        setup = prepare(begun, device, ranks, trust_code=trust_code)
        with begin(
            setup, recipe, out, overwrite=overwrite, resume=resume, tensorboard=tensorboard
        ) as training:
            ranks.say(opening(setup))
            try:
                train_together(setup, [training], workers=workers, checkpoint_seconds=checkpoint_seconds)
            except KeyboardInterrupt:
                ranks.say(f"interrupted: the same command with --resume goes on with {out}")
                raise
    if training.diverged is not None:
        raise training.diverged
    return training.metrics


def begin(
    setup: Setup, recipe: TrainRecipe, out: Path, *, overwrite: bool, resume: bool, tensorboard: bool
) -> StudentRun:
    """A fresh student in a new folder, or one as its checkpoint has it; a context that gives up the folder.

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
    folder = RunFolder(out, overwrite=overwrite, resume=resume) if is_first else OthersFolder(out)
    try:
        return _begun(
            setup, recipe, folder, state, overwrite=overwrite, resume=resume, tensorboard=tensorboard
        )
    except BaseException:
        folder.close(keep=False)
        raise


def _begun(
    setup: Setup,
    recipe: TrainRecipe,
    folder: RunFolder | OthersFolder,
    state: TrainState,
    *,
    overwrite: bool,
    resume: bool,
    tensorboard: bool,
) -> StudentRun:
    """`begin` in a folder that is locked."""
    out, facts = folder.path, provenance(setup)
    identity = {"recipe": recipe.model_dump(mode="json"), **lasting(facts)}
    position, log = Position(), new_metrics(state)
    saved = load_checkpoint(out, setup.device) if resume else None
    if saved is not None:
        check_begun(out, facts)
        check_identity(out, saved, identity)
        steps = setup.steps_per_epoch
        position = restore(out, saved, state, log, epochs=recipe.epochs, batches=steps)
    # Nobody writes before all have looked.
    _check_all_see(setup.ranks, out, None if saved is None else saved["position"])
    if saved is not None:
        if isinstance(folder, RunFolder):
            folder.reopen(position.epoch)
        setup.ranks.say(f"resuming {out} in epoch {position.epoch} after {position.batches} batches")
    elif isinstance(folder, RunFolder):
        folder.begin(recipe, facts, state.learner.network, overwrite=overwrite)
    state.copy_first_rank()
    first = position.epoch if resume else None
    board = Board(out / BOARD_FOLDER, first=first) if tensorboard and setup.ranks.is_first else NoBoard()
    return StudentRun(recipe, folder, state, board, position, log, identity)


def _check_all_see(ranks: Ranks, out: Path, seen: object) -> None:
    """Refuse ranks that would begin at different places."""
    everywhere = ranks.gathered(seen)
    if any(other != everywhere[0] for other in everywhere):
        raise RunError(
            f"ranks see different checkpoints in {str(out)!r}: --out has to be one folder for all of them, "
            "as on a shared file system"
        )


def train_together(
    setup: Setup, trainings: Sequence[StudentRun], *, workers: int | None, checkpoint_seconds: float
) -> None:
    """Train students that are equally far on one stream of batches, until all are over.

    Each is kept as soon as it is finished. One that diverges is left unfinished, and says so in `diverged`.
    """
    recipe, first = setup.recipe, trainings[0].position
    states = [training.state for training in trainings]
    total = len(setup.samples)
    done = first.epoch * total + _rows_before(setup, first)
    with ExitStack() as stack:
        title = f"train {', '.join(training.folder.path.name for training in trainings)}"
        meter = stack.enter_context(
            progress(title, recipe.epochs * total, "samples", done=done, shown=setup.ranks.is_first)
        )
        pin, sizes = setup.device.type == "cuda", setup.sizes([state.learner.network for state in states])
        renderer = stack.enter_context(Renderer(setup.source, recipe.view, sizes, workers=workers, pin=pin))
        looking = stack.enter_context(
            Renderer(setup.evaluation, evaluation_view(setup.evaluation), sizes, workers=workers, pin=pin)
        )
        for training in trainings:
            stack.enter_context(training.board)
        checkpoints = _Every(checkpoint_seconds)
        while active := [training for training in trainings if not training.is_over]:
            rows = len(setup.samples) - _rows_before(setup, active[0].position)
            _train_epoch_of(setup, active, renderer, checkpoints)
            if setup.targets is not None:
                setup.targets.check_unchanged()
            _evaluate(setup, active, looking)
            found = [training.position.best for training in active if training.position.best is not None]
            meter.advance(rows, f"best accuracy {max(found):.2%}" if found else "")
            for training in active:
                if training.is_finished:
                    training.folder.finish(training.state.network)


def _train_epoch_of(
    setup: Setup, active: Sequence[StudentRun], renderer: Renderer, checkpoints: _Every
) -> None:
    """What is left of an epoch of several trainings, with checkpoints on the way."""
    epoch, begun = active[0].position.epoch, active[0].position.batches
    before, started = [training.position.seconds for training in active], time.perf_counter()
    steps = train_steps(
        [training.state for training in active],
        renderer.ahead(setup.batches(epoch, begun)),
        setup.targets,
        [training.log for training in active],
        epoch,
        micro_batches=setup.recipe.accumulate,
        first=begun,
    )
    for batches in steps:
        spent = (time.perf_counter() - started) / len(active)
        for training, seconds in zip(active, before, strict=True):
            training.position.batches, training.position.seconds = batches, seconds + spent
        if setup.ranks.first_says(checkpoints.is_due()):
            for training in active:
                training.save()


def _evaluate(setup: Setup, active: Sequence[StudentRun], renderer: Renderer) -> None:
    """End an epoch of several trainings, with an evaluation where it is due."""
    epoch, recipe = active[0].position.epoch, setup.recipe
    is_due = (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs
    for training in active:
        network = training.state.network
        found = None
        if is_due:
            found = evaluate(network, setup.evaluation, setup.device, renderer=renderer, ranks=setup.ranks)
        try:
            training.end_epoch(setup.views_of_epoch(epoch), found)
        except TrainingDiverged as error:
            check_targets(setup.targets, setup.views_of_epoch(epoch))
            training.diverged = error


def _rows_before(setup: Setup, position: Position) -> int:
    """Samples of an epoch that are done."""
    return min(
        len(setup.samples), position.batches * (setup.recipe.batch_size // setup.recipe.views_per_load)
    )


class _Every:
    """Says when so many seconds have gone by."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time; if so, the time runs anew."""
        if time.monotonic() - self._since < self._seconds:
            return False
        self._since = time.monotonic()
        return True


def _check_finite(metrics: dict[str, float], epoch: int, recipe: TrainRecipe) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"training diverged in epoch {epoch}: {name} is {value}. Use a smaller --lr than "
                f"{recipe.optimizer.lr:g}. What is left of the run stays until it is removed or --overwrite "
                "is given."
            )
