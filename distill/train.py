"""The training loop: trainees on one stream of batches, with targets or without."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.console import progress
from coursepack.data.loading import Renderer
from coursepack.distill.board import Board, NoBoard, check_tensorboard
from coursepack.distill.checkpoint import (
    CHECKPOINT_FILE,
    Position,
    check_identity,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from coursepack.distill.checks import check_student
from coursepack.distill.epoch_log import EpochLog
from coursepack.distill.evaluate import evaluate, evaluation_view
from coursepack.distill.facts import Moment
from coursepack.distill.machine import algorithms, generators_of, threads_of
from coursepack.distill.prepare import opening, prepare, provenance
from coursepack.distill.ranks import ALONE
from coursepack.distill.run_folder import (
    BOARD_FOLDER,
    OthersFolder,
    RunFolder,
    as_begun,
    check_begun,
    finished_metrics,
    lasting,
)
from coursepack.errors import RunError, TrainingDiverged
from coursepack.models.build import WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import Self

    import torch

    from coursepack.data import Batch
    from coursepack.distill.prepare import Run
    from coursepack.distill.ranks import Ranks
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.targets import TargetsKind
    from coursepack.distill.trainee import Trainee

CHECKPOINT_SECONDS = 60.0


@dataclass
class Training:
    """One student on its way: its recipe, its folder, and how far it is."""

    recipe: TrainRecipe
    folder: RunFolder | OthersFolder
    trainee: Trainee
    board: Board | NoBoard
    position: Position
    log: EpochLog
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
        self.folder.close(keep=kind is None or self.trainee.steps > 0)

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
        save_checkpoint(self.folder.path, self.position, self.trainee, self.log, self.identity)

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
                self.folder.keep_best(self.trainee.network)
                best, stale = evaluation["accuracy"], 0
            else:
                stale += 1
        self.position = Position(epoch + 1, best=best, stale=stale)
        self.log = _new_log(self.trainee)


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
        run = prepare(begun, device, ranks, trust_code=trust_code)
        with begin(run, recipe, out, overwrite=overwrite, resume=resume, tensorboard=tensorboard) as training:
            ranks.say(opening(run))
            try:
                train_together(run, [training], workers=workers, checkpoint_seconds=checkpoint_seconds)
            except KeyboardInterrupt:
                ranks.say(f"interrupted: the same command with --resume goes on with {out}")
                raise
    if training.diverged is not None:
        raise training.diverged
    return training.metrics


def begin(
    run: Run, recipe: TrainRecipe, out: Path, *, overwrite: bool, resume: bool, tensorboard: bool
) -> Training:
    """A fresh student in a new folder, or one as its checkpoint has it; a context that gives up the folder.

    Raises:
        RunError, RunBusy, RecipeError, StoreDamaged: as `train`.
    """
    trainee = run.trainee_with(recipe)
    check_student(trainee.learner, run.source)
    if tensorboard:
        check_tensorboard()
    if run.targets is not None and not (resume and (out / CHECKPOINT_FILE).is_file()):
        for view in run.views_of_epoch(0):
            run.targets.open(view, _asked([trainee], Moment()))
    is_first = run.ranks.is_first
    folder = RunFolder(out, overwrite=overwrite, resume=resume) if is_first else OthersFolder(out)
    try:
        return _begun(
            run, recipe, folder, trainee, overwrite=overwrite, resume=resume, tensorboard=tensorboard
        )
    except BaseException:
        folder.close(keep=False)
        raise


def _begun(
    run: Run,
    recipe: TrainRecipe,
    folder: RunFolder | OthersFolder,
    trainee: Trainee,
    *,
    overwrite: bool,
    resume: bool,
    tensorboard: bool,
) -> Training:
    """`begin` in a folder that is locked."""
    out, facts = folder.path, provenance(run)
    identity = {"recipe": recipe.model_dump(mode="json"), **lasting(facts)}
    position, log = Position(), _new_log(trainee)
    state = load_checkpoint(out, run.device) if resume else None
    if state is not None:
        check_begun(out, facts)
        check_identity(out, state, identity)
        steps = run.steps_per_epoch
        position = restore(out, state, trainee, log, epochs=recipe.epochs, batches=steps)
    # Nobody writes before all have looked.
    _check_all_see(run.ranks, out, None if state is None else state["position"])
    if state is not None:
        if isinstance(folder, RunFolder):
            folder.reopen(position.epoch)
        run.ranks.say(f"resuming {out} in epoch {position.epoch} after {position.batches} batches")
    elif isinstance(folder, RunFolder):
        folder.begin(recipe, facts, trainee.learner.network, overwrite=overwrite)
    trainee.agree()
    first = position.epoch if resume else None
    board = Board(out / BOARD_FOLDER, first=first) if tensorboard and run.ranks.is_first else NoBoard()
    return Training(recipe, folder, trainee, board, position, log, identity)


def _check_all_see(ranks: Ranks, out: Path, seen: object) -> None:
    """Refuse ranks that would begin at different places."""
    everywhere = ranks.gathered(seen)
    if any(other != everywhere[0] for other in everywhere):
        raise RunError(
            f"ranks see different checkpoints in {str(out)!r}: --out has to be one folder for all of them, "
            "as on a shared file system"
        )


def train_together(
    run: Run, trainings: Sequence[Training], *, workers: int | None, checkpoint_seconds: float
) -> None:
    """Train students that are equally far on one stream of batches, until all are over.

    Each is kept as soon as it is finished. One that diverges is left unfinished, and says so in `diverged`.
    """
    recipe, first = run.recipe, trainings[0].position
    trainees = [training.trainee for training in trainings]
    total = len(run.samples)
    done = first.epoch * total + _rows_before(run, first)
    with ExitStack() as stack:
        title = f"train {', '.join(training.folder.path.name for training in trainings)}"
        meter = stack.enter_context(
            progress(title, recipe.epochs * total, "samples", done=done, shown=run.ranks.is_first)
        )
        pin, sizes = run.device.type == "cuda", run.sizes(trainees)
        renderer = stack.enter_context(Renderer(run.source, recipe.view, sizes, workers=workers, pin=pin))
        looking = stack.enter_context(
            Renderer(run.evaluation, evaluation_view(run.evaluation), sizes, workers=workers, pin=pin)
        )
        for training in trainings:
            stack.enter_context(training.board)
        checkpoints = _Every(checkpoint_seconds)
        while active := [training for training in trainings if not training.is_over]:
            rows = len(run.samples) - _rows_before(run, active[0].position)
            _train_epoch_of(run, active, renderer, checkpoints)
            if run.targets is not None:
                run.targets.check_unchanged()
            _evaluate(run, active, looking)
            found = [training.position.best for training in active if training.position.best is not None]
            meter.advance(rows, f"best accuracy {max(found):.2%}" if found else "")
            for training in active:
                if training.is_finished:
                    training.folder.finish(training.trainee.network)


def _train_epoch_of(run: Run, active: Sequence[Training], renderer: Renderer, checkpoints: _Every) -> None:
    """What is left of an epoch of several trainings, with checkpoints on the way."""
    epoch, begun = active[0].position.epoch, active[0].position.batches
    before, started = [training.position.seconds for training in active], time.perf_counter()
    steps = train_steps(
        [training.trainee for training in active],
        renderer.ahead(run.batches(epoch, begun)),
        run.targets,
        [training.log for training in active],
        epoch,
        parts=run.recipe.accumulate,
        first=begun,
    )
    for batches in steps:
        spent = (time.perf_counter() - started) / len(active)
        for training, seconds in zip(active, before, strict=True):
            training.position.batches, training.position.seconds = batches, seconds + spent
        if run.ranks.first_says(checkpoints.is_due()):
            for training in active:
                training.save()


def _evaluate(run: Run, active: Sequence[Training], renderer: Renderer) -> None:
    """End an epoch of several trainings, with an evaluation where it is due."""
    epoch, recipe = active[0].position.epoch, run.recipe
    is_due = (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs
    for training in active:
        network = training.trainee.network
        found = None
        if is_due:
            found = evaluate(network, run.evaluation, run.device, renderer=renderer, ranks=run.ranks)
        try:
            training.end_epoch(run.views_of_epoch(epoch), found)
        except TrainingDiverged as error:
            _check_targets(run.targets, run.views_of_epoch(epoch))
            training.diverged = error


def _rows_before(run: Run, position: Position) -> int:
    """Samples of an epoch that are done."""
    return min(len(run.samples), position.batches * (run.recipe.batch_size // run.recipe.views_per_load))


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


def train_epoch(
    trainees: Sequence[Trainee],
    batches: Iterable[Batch],
    targets: TargetsKind | None,
    epoch: int = 0,
    *,
    parts: int = 1,
) -> list[dict[str, Any]]:
    """One pass of every trainee over the same batches; returns what each one's `EpochLog` tells."""
    logs = [_new_log(trainee) for trainee in trainees]
    for _ in train_steps(trainees, batches, targets, logs, epoch, parts=parts):
        pass
    return [log.means() for log in logs]


def train_steps(
    trainees: Sequence[Trainee],
    batches: Iterable[Batch],
    targets: TargetsKind | None,
    logs: Sequence[EpochLog],
    epoch: int = 0,
    *,
    parts: int = 1,
    first: int = 0,
) -> Iterator[int]:
    """Train on the batches of an epoch, or on what is left of them, one step at a time.

    Args:
        trainees: who learns; all see the same batches.
        batches: of the epoch, from the first that is not done.
        targets: what the teachers say; None where nobody asks.
        logs: where each trainee's epoch is counted.
        epoch: its number.
        parts: how many parts each batch is worked through in.
        first: number of the first batch.

    Yields:
        After every step, how many batches of the epoch are done.
    """
    for trainee in trainees:
        trainee.learner.train()
        trainee.learner.begin_epoch(epoch)
    for number, batch in enumerate(batches, first):
        for trainee in trainees:
            trainee.begin_step()
        for place, part in enumerate(batch.split(parts) if parts > 1 else [batch]):
            moment = Moment(epoch, number, place)
            asked = _asked(trainees, moment)
            looked_at = [trainee.learner.rows_for(part) for trainee in trainees]
            fetched = {
                id(rows): None if targets is None else targets.fetch(rows, asked)
                for rows in _distinct(looked_at)
            }
            for trainee, log, rows in zip(trainees, logs, looked_at, strict=True):
                share = _share(trainee.learner.ranks, rows, part, batch)
                try:
                    output = trainee.add_gradient(part, fetched[id(rows)], moment, share)
                except TrainingDiverged:
                    _check_targets(targets, np.unique(rows.view).tolist())
                    raise
                log.add(output, rows)
        for trainee in trainees:
            trainee.end_step()
        yield number + 1


def _share(ranks: Ranks, rows: Batch, part: Batch, batch: Batch) -> float:
    """What the loss of a part counts: the mean over ranks of the sum over parts is the mean over all rows."""
    return len(part) / len(batch) if rows.whole is None else ranks.count * len(part) / len(rows.whole)


def _distinct(batches: Sequence[Batch]) -> list[Batch]:
    return list({id(batch): batch for batch in batches}.values())


def _new_log(trainee: Trainee) -> EpochLog:
    learner = trainee.learner
    return EpochLog(learner.objective.setting.fusion.teachers, learner.ranks)


def _asked(trainees: Sequence[Trainee], moment: Moment) -> list[int] | None:
    """Places of the teachers that any of the trainees asks for a batch; None means all."""
    chosen = {trainee.learner.objective.chosen_teacher(moment) for trainee in trainees}
    places = [place for place in chosen if place is not None]
    return sorted(places) if len(places) == len(chosen) else None


def _check_targets(targets: TargetsKind | None, views: Sequence[int]) -> None:
    """Refuse targets that are the cause of a loss that is not finite.

    Raises:
        StoreDamaged: files of a store were changed while they were read.
        NonFiniteOutput: targets are not finite.
    """
    if targets is not None:
        targets.check_unchanged()
        targets.check_finite(views)


def _check_finite(metrics: dict[str, float], epoch: int, recipe: TrainRecipe) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"training diverged in epoch {epoch}: {name} is {value}. Use a smaller --lr than "
                f"{recipe.optimiser.lr:g}. What is left of the run stays until it is removed or --overwrite "
                "is given."
            )
