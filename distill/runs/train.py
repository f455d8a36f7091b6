"""Training of runs, one or several on the same batches, from setup to finished folders."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from coursepack.console import progress, warn
from coursepack.data.loading import Renderer
from coursepack.distill.distributed import SINGLE_RANK
from coursepack.distill.runs import CHECKPOINT_SECONDS
from coursepack.distill.runs.folder import finished_metrics, is_finished, recipe_to_resume
from coursepack.distill.runs.start import check_same_on_all_ranks, start_run
from coursepack.distill.runs.tracking import trackers_of
from coursepack.distill.setup.describe import describe_training, warnings_of
from coursepack.distill.setup.prepare import describe_setup, prepare
from coursepack.distill.training.checkpoint import CHECKPOINT_FILE, Position
from coursepack.distill.training.evaluate import evaluation_view
from coursepack.distill.training.loop import check_targets, teachers_of_epoch, train_steps
from coursepack.distill.training.runtime import preserved_generators, torch_algorithms, torch_threads
from coursepack.errors import TrainingDiverged

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from coursepack.distill.distributed import Ranks
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.start import Run
    from coursepack.distill.setup.prepare import Setup


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
    track: Sequence[str] = (),
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ranks: Ranks = SINGLE_RANK,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Train a student, or a student and its peers, into a run folder.

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
        tensorboard: also write the metrics for TensorBoard; the same as "tensorboard" in `track`.
        track: names of trackers that show the metrics, see `TRACKERS`.
        checkpoint_seconds: time between checkpoints; 0 means after every step.
        ranks: rank of this process.
        trust_code: allow stores to name Python code for live teachers.

    Returns:
        The metrics of the last epoch; of a student and its peers, those of their ensemble.

    Raises:
        RunBusy: another process is training into the folder.
        RunError: the folder is not empty, or holds a run that cannot be resumed with this recipe.
        TrainingDiverged: the loss is not finite; the run stays unfinished.
        Otherwise as `prepare`.
    """
    if resume:
        seen = [is_finished(out, recipe), (out / CHECKPOINT_FILE).is_file()]
        check_same_on_all_ranks(ranks, out, seen)
    if resume and (metrics := finished_metrics(out, recipe)) is not None:
        ranks.log_once(f"{out} is finished: there is nothing to resume")
        return metrics
    trackers = trackers_of(track, tensorboard=tensorboard)
    resumed = recipe_to_resume(out, recipe) if resume else recipe
    with (
        torch_algorithms(deterministic=recipe.deterministic),
        torch_threads(threads),
        preserved_generators(device),
    ):
        setup = prepare(resumed, device, ranks, trust_code=trust_code)
        with start_run(setup, recipe, out, overwrite=overwrite, resume=resume, track=trackers) as run:
            ranks.log_once(describe_setup(setup))
            ranks.log_once(describe_training(recipe, setup))
            for warning in warnings_of(recipe, setup.readers):
                ranks.warn_once(warning)
            try:
                train_together(setup, [run], workers=workers, checkpoint_seconds=checkpoint_seconds)
            except KeyboardInterrupt:
                if ranks.is_first:
                    warn(f"interrupted: the same command with --resume continues {out}")
                raise
    if run.diverged is not None:
        raise run.diverged
    return run.metrics


def train_together(
    setup: Setup, runs: Sequence[Run], *, workers: int | None, checkpoint_seconds: float
) -> None:
    """Train runs at the same position on one stream of batches, until all are finished or diverged.

    Each run is saved as soon as it is finished. A diverged one stays unfinished, with the error in
    `diverged`.
    """
    recipe, first = setup.recipe, runs[0].position
    students = [student for run in runs for student in run.students]
    total = len(setup.samples)
    done = first.epoch * total + _rows_before(setup, first)
    with ExitStack() as stack:
        title = f"train {', '.join(run.folder.path.name for run in runs)}"
        meter = stack.enter_context(
            progress(title, recipe.epochs * total, "samples", done=done, shown=setup.ranks.is_first)
        )
        pin, sizes = (
            setup.device.type == "cuda",
            setup.sizes([student.state.learner.network for student in students]),
        )
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
        for student in students:
            stack.enter_context(student.tracking)
        checkpoints = _Interval(checkpoint_seconds)
        while active := [run for run in runs if not run.is_over]:
            rows = len(setup.samples) - _rows_before(setup, active[0].position)
            _train_epoch(setup, active, renderer, checkpoints)
            if setup.targets is not None:
                setup.targets.check_unchanged()
            _evaluate(setup, active, evaluation_renderer)
            best = [each.position.best for each in students if each.position.best is not None]
            meter.advance(rows, f"best accuracy {max(best):.2%}" if best else "")
            for run in active:
                if run.is_finished:
                    run.finish()


def _train_epoch(setup: Setup, active: Sequence[Run], renderer: Renderer, checkpoints: _Interval) -> None:
    """Train several runs on the rest of an epoch, writing checkpoints when they are due."""
    epoch, first = active[0].position.epoch, active[0].position.batches
    students = [student for run in active for student in run.students]
    before, started = [student.position.seconds for student in students], time.perf_counter()
    states = [student.state for student in students]
    steps = train_steps(
        [[student.state for student in run.students] for run in active],
        renderer.ahead(setup.batches(epoch, first, lambda turn: teachers_of_epoch(states, turn))),
        setup.targets,
        [student.log for student in students],
        epoch,
        micro_batches=setup.recipe.accumulate,
        first=first,
    )
    for batches in steps:
        spent = (time.perf_counter() - started) / len(students)
        for student, seconds in zip(students, before, strict=True):
            student.position.batches, student.position.seconds = batches, seconds + spent
        if setup.ranks.broadcast_flag(checkpoints.is_due()):
            for run in active:
                run.save()


def _evaluate(setup: Setup, active: Sequence[Run], renderer: Renderer) -> None:
    """End an epoch of several runs, with an evaluation if it is due."""
    epoch, recipe = active[0].position.epoch, setup.recipe
    is_due = (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs
    for run in active:
        evaluation: Any = run.evaluate(setup, renderer) if is_due else None
        try:
            run.end_epoch(setup.views_of_epoch(epoch), evaluation)
        except TrainingDiverged as error:
            check_targets(setup.targets, setup.views_of_epoch(epoch))
            run.diverged = error
            for student in run.students:
                student.tracking.end(error)


def _rows_before(setup: Setup, position: Position) -> int:
    """Return the number of samples of the epoch that are completed at a position."""
    return min(len(setup.samples), position.batches * setup.samples_per_step)


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
