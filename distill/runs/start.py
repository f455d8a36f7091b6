"""Start of runs: in a new folder, or from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.distill.losses.base import Step
from coursepack.distill.runs.folder import (
    ReadOnlyRunFolder,
    RunFolder,
    check_provenance,
    fixed_provenance,
    student_folders,
)
from coursepack.distill.runs.group import GroupRun
from coursepack.distill.runs.student import StudentRun
from coursepack.distill.runs.tracking import start_tracking
from coursepack.distill.setup.prepare import provenance
from coursepack.distill.training.checkpoint import (
    CHECKPOINT_FILE,
    Position,
    check_identity,
    load_checkpoint,
    of_student,
    restore,
)
from coursepack.distill.training.group import make_group
from coursepack.distill.training.loop import new_metrics, teachers_read
from coursepack.errors import RunError
from coursepack.kernels.preload import ANGLES, DIVERGENCES, HINTS, LOSS, preload

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from coursepack.distill.distributed import Ranks
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.setup.prepare import Setup
    from coursepack.distill.training.metrics import EpochMetrics
    from coursepack.distill.training.state import TrainState

    Folder = RunFolder | ReadOnlyRunFolder
    Run = StudentRun | GroupRun
    Progress = tuple[TrainState, Position, EpochMetrics]


def start_run(
    setup: Setup, recipe: TrainRecipe, out: Path, *, overwrite: bool, resume: bool, track: Sequence[str]
) -> Run:
    """Start the run of a student, or of a student and its peers, in a new folder or from its checkpoint.

    The result is a context manager that unlocks the folder.

    Raises:
        RunError, RunBusy, RecipeError, StoreDamaged: as `train`.
    """
    preload(compiled_modules(recipe, setup.device))
    states = make_group(setup, recipe)
    if setup.targets is not None and not (resume and (out / CHECKPOINT_FILE).is_file()):
        for view in setup.views_of_epoch(0):
            setup.targets.open(view, teachers_read(states, Step()))
    is_first = setup.ranks.is_first
    folder = RunFolder(out, overwrite=overwrite, resume=resume) if is_first else ReadOnlyRunFolder(out)
    opened: list[Folder] = [folder]
    try:
        return _start_in_folder(
            setup, recipe, opened, states, overwrite=overwrite, resume=resume, track=track
        )
    except BaseException:
        for each in reversed(opened):
            each.close(keep=False)
        raise


def _start_in_folder(
    setup: Setup,
    recipe: TrainRecipe,
    opened: list[Folder],
    states: Sequence[TrainState],
    *,
    overwrite: bool,
    resume: bool,
    track: Sequence[str],
) -> Run:
    """Start or restore a run in a folder that is already locked; adds its students' folders to `opened`."""
    folder, origin = opened[0], provenance(setup)
    identity = {"recipe": recipe.model_dump(mode="json"), **fixed_provenance(origin)}
    progress, is_restored = _restored(setup, recipe, folder.path, states, identity, origin, resume=resume)
    if is_restored:
        epoch, batches = progress[0][1].epoch, progress[0][1].batches
        setup.ranks.log_once(f"resuming {folder.path} in epoch {epoch} after {batches} batches")
    if recipe.peers:
        _open(folder, recipe, origin, None, progress[0][1], is_restored=is_restored, overwrite=overwrite)
    students = []
    paths = student_folders(folder.path, recipe)
    for path, member, (state, position, log) in zip(paths, recipe.members(), progress, strict=True):
        own = folder
        if recipe.peers:
            own = RunFolder(path, overwrite=True) if setup.ranks.is_first else ReadOnlyRunFolder(path)
            opened.append(own)
        _open(own, member, origin, state, position, is_restored=is_restored, overwrite=overwrite)
        state.broadcast_weights()
        tracking = start_tracking(
            track if setup.ranks.is_first else (),
            path,
            str(path.relative_to(folder.path.parent)),
            member.model_dump(mode="json"),
            first=position.epoch if resume else None,
        )
        students.append(StudentRun(member, own, state, tracking, position, log, identity))
    return GroupRun(recipe, folder, students, identity) if recipe.peers else students[0]


def _restored(
    setup: Setup,
    recipe: TrainRecipe,
    out: Path,
    states: Sequence[TrainState],
    identity: dict[str, Any],
    origin: dict[str, Any],
    *,
    resume: bool,
) -> tuple[list[Progress], bool]:
    """Return the progress of every student, and whether it was restored from a checkpoint."""
    progress: list[Progress] = [(state, Position(), new_metrics(state)) for state in states]
    saved = load_checkpoint(out, setup.device) if resume else None
    if saved is not None:
        check_provenance(out, origin)
        check_identity(out, saved, identity)
        for index, (state, _, log) in enumerate(progress):
            content = of_student(out, saved, index, len(states)) if recipe.peers else saved
            position = restore(out, content, state, log, epochs=recipe.epochs, batches=setup.steps_per_epoch)
            progress[index] = (state, position, log)
    # No rank may write before all ranks have read the folder.
    check_same_on_all_ranks(setup.ranks, out, None if saved is None else saved["position"])
    return progress, saved is not None


def _open(
    folder: Folder,
    recipe: TrainRecipe,
    origin: dict[str, Any],
    state: TrainState | None,
    position: Position,
    *,
    is_restored: bool,
    overwrite: bool,
) -> None:
    """Write the first files of a run, or drop the metrics that a restored run will write again."""
    if not isinstance(folder, RunFolder):
        return
    if is_restored:
        folder.reopen(position.epoch)
    else:
        network = None if state is None else state.learner.network
        folder.begin(recipe, origin, network, overwrite=overwrite)


def compiled_modules(recipe: TrainRecipe, device: torch.device) -> list[str]:
    """Return the modules of compiled functions that the students of a recipe call."""
    if device.type != "cpu":
        return []
    objectives = [member.objective for member in recipe.members()]
    terms = {term.term for objective in objectives for term in objective.all_terms().values()}
    divergences = {objective.divergence for objective in objectives if objective.needs().fused}
    return [
        *(LOSS if "kl" in divergences else ()),
        *(DIVERGENCES if divergences - {"kl"} else ()),
        *(ANGLES if "angle" in terms else ()),
        *(HINTS if "hint" in terms else ()),
    ]


def check_same_on_all_ranks(ranks: Ranks, out: Path, seen: object) -> None:
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
