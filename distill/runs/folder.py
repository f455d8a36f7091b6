"""Folder of a run.

recipe.yaml          complete recipe; trains the same run again
provenance.json      fingerprints of the stores, class names, library versions, device
network.yaml         description of the student, from which `run:FOLDER` builds it
metrics.jsonl        metrics, one line per epoch
best.safetensors     weights of the student after the evaluation with the best accuracy
checkpoints/         weights of the student after every EVERY epochs (--keep-checkpoints), each a file
                     epoch-EPOCH.safetensors that `run:FOLDER@EPOCH` loads; EPOCH counts completed epochs
checkpoint.pt        training state; present while the run is unfinished
lock                 lock of the process that trains the run
student.safetensors  weights of the student after the last epoch; present if the run is finished
tracking.json        identifiers of the run in services that track it (--track)

The folder of a group of students that train together holds the run folder of each, `0` for the student and
`1`, `2`, ... for its peers. Beside them it has recipe.yaml, provenance.json, checkpoint.pt and lock, and

metrics.jsonl        metrics of the students' ensemble, one line per epoch
exchange.safetensors weights of the exchange between the students, if it has any
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from coursepack.canonical import canonical_json, difference_table
from coursepack.config import parse_config, write_yaml
from coursepack.distill.recipe import TrainRecipe, load_recipe
from coursepack.distill.renamed import upgrade_recipe
from coursepack.distill.runs.records import read_metrics, read_provenance
from coursepack.distill.runs.tracking import TRACKING_FILE, TRACKING_FOLDERS
from coursepack.distill.training.checkpoint import CHECKPOINT_FILE
from coursepack.errors import RunBusy, RunError
from coursepack.files import naming, open_regular, partials, write_whole
from coursepack.locks import FileLock, Held
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE
from coursepack.models.record import METRICS_FILE, RECIPE_FILE
from coursepack.models.run_specs import BEST_FILE, CHECKPOINTS_FOLDER, checkpoint_file, kept_epochs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from coursepack.models import Network

PROVENANCE_FILE = "provenance.json"
LOCK_FILE = "lock"
EXCHANGE_FILE = "exchange.safetensors"
RUN_FILES = (
    *(RECIPE_FILE, PROVENANCE_FILE, NETWORK_FILE, METRICS_FILE, BEST_FILE, CHECKPOINT_FILE),
    TRACKING_FILE,
)
"""Files of an unfinished run."""

FIXED_PROVENANCE = ("stores", "view_fingerprint", "source_fingerprint", "views", "window")
"""Keys of the provenance that must not change before a run is resumed. Stores may have more views by then, as
long as the run does not use them."""


@dataclass(frozen=True)
class FinishedRun:
    """Recipe and metrics of a finished run."""

    path: Path
    recipe: TrainRecipe
    metrics: list[dict[str, Any]]
    """Metrics of each epoch."""
    ensemble: str = ""
    """Name of the ensemble that the metrics are of; empty for those of a student."""


class RunFolder:
    """Folder of a run that this process trains, locked against other processes until it is closed."""

    def __init__(self, path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Create the folder if it does not exist, and lock it.

        Args:
            path: the folder.
            overwrite: allow the folder to hold a run, which will be replaced.
            resume: allow the folder to hold an unfinished run.

        Raises:
            RunError: the folder cannot be created, or holds something else.
            RunBusy: another process is training this run.
        """
        self.path = path
        check_free(path, overwrite=overwrite, resume=resume)
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot create the run's folder {str(path)!r}: {error.strerror}. Choose another --out."
            ) from error
        try:
            self._lock = FileLock(path / LOCK_FILE)
        except Held as holder:
            raise RunBusy(
                f"run {str(path)!r} is being trained by {holder}: wait for it, stop it, or choose another "
                "--out"
            ) from holder
        except OSError:
            _remove_empty(missing)
            raise
        self._made: list[Path] | None = None
        """Folders that were created for this run; None if the run existed before."""
        try:
            # Check again under the lock, since another process may have trained the run meanwhile.
            check_free(path, overwrite=overwrite, resume=resume)
            if (path / WEIGHTS_FILE).is_file() and not overwrite:
                raise RunError(
                    f"run {str(path)!r} was finished by another process just now: nothing is left to do"
                )
        except BaseException:
            self.close()
            raise
        if not (path / RECIPE_FILE).is_file():
            self._made = missing

    def begin(
        self, recipe: TrainRecipe, provenance: dict[str, Any], network: Network | None, *, overwrite: bool
    ) -> None:
        """Write recipe, provenance and network of a new run, replacing an earlier one.

        A group has no network.
        """
        path = self.path
        _clear_partials(path)
        if overwrite and (path / RECIPE_FILE).is_file():
            _clear(path)
            self._made = []
        (path / BEST_FILE).unlink(missing_ok=True)
        _forget_checkpoints(path, 0)
        write_whole(path / RECIPE_FILE, write_yaml(recipe.model_dump(mode="json")).encode())
        write_whole(path / PROVENANCE_FILE, canonical_json(provenance, indent=1).encode())
        if network is not None:
            write_whole(path / NETWORK_FILE, write_yaml(network.describe()).encode())
        (path / METRICS_FILE).write_bytes(b"")

    def reopen(self, epoch: int) -> None:
        """Continue an unfinished run from an epoch, dropping what that epoch and later ones wrote."""
        path = self.path
        _clear_partials(path)
        # A group that was killed while it was being finished has the final weights of some of its students.
        (path / WEIGHTS_FILE).unlink(missing_ok=True)
        _forget_checkpoints(path, epoch)
        with os.fdopen(open_regular(path / METRICS_FILE), "rb") as file:
            lines = file.readlines()
        write_whole(path / METRICS_FILE, *lines[:epoch])

    def close(self, *, keep: bool = True) -> None:
        """Unlock the folder; if `keep` is false, remove it if it was created for this run."""
        if not keep and self._made is not None:
            for name in TRACKING_FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
            files = [self.path / name for name in RUN_FILES if name != RECIPE_FILE]
            # The recipe last: if this process is killed meanwhile, a run is left that can be resumed.
            for file in (*files, *partials(self.path), self.path / RECIPE_FILE):
                file.unlink(missing_ok=True)
        self._lock.release()
        if not keep and self._made is not None:
            _remove_empty(self._made)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one epoch's metrics."""
        path = self.path / METRICS_FILE
        with naming(path), path.open("a") as file:
            file.write(canonical_json(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())  # later checkpoints assume that this line is on disk

    def keep_best(self, network: Network) -> None:
        """Write the weights of the best student so far."""
        write_whole(self.path / BEST_FILE, _weights(network.module))

    def keep_checkpoint(self, network: Network, epochs: int) -> None:
        """Write the weights after a number of epochs."""
        file = checkpoint_file(self.path, epochs)
        file.parent.mkdir(exist_ok=True)
        write_whole(file, _weights(network.module))

    def finish(self, network: Network) -> None:
        """Write the final weights, and remove the checkpoint."""
        write_whole(self.path / WEIGHTS_FILE, _weights(network.module))
        self.remove_checkpoint()

    def remove_checkpoint(self) -> None:
        """Remove the checkpoint of a finished run."""
        (self.path / CHECKPOINT_FILE).unlink(missing_ok=True)

    def finish_group(self, exchange: nn.Module | None) -> None:
        """Write the exchange's weights, if it has any, of a group whose students are finished next."""
        if exchange is not None and any(value.requires_grad for value in exchange.parameters()):
            write_whole(self.path / EXCHANGE_FILE, _weights(exchange))


@dataclass(frozen=True)
class ReadOnlyRunFolder:
    """Folder of a run on ranks other than the first, which write nothing."""

    path: Path

    def close(self, *, keep: bool = True) -> None:
        """Do nothing: the first rank holds the lock."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Do nothing."""

    def keep_best(self, network: Network) -> None:
        """Do nothing."""

    def keep_checkpoint(self, network: Network, epochs: int) -> None:
        """Do nothing."""

    def finish(self, network: Network) -> None:
        """Do nothing."""

    def finish_group(self, exchange: nn.Module | None) -> None:
        """Do nothing."""

    def remove_checkpoint(self) -> None:
        """Do nothing."""


def _weights(module: nn.Module) -> bytes:
    return save({name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()})


def finished_metrics(path: Path, recipe: TrainRecipe) -> dict[str, Any] | None:
    """Return the last metrics of a finished run, or None if the run is not finished.

    Raises:
        RunError: the run has another recipe.
    """
    if not is_finished(path, recipe):
        return None
    finished = load_runs(path)[-1]
    _check_same(path, finished.recipe.model_dump(mode="json"), recipe.model_dump(mode="json"))
    (path / CHECKPOINT_FILE).unlink(missing_ok=True)  # left if a process was killed before removing it
    _clear_partials(path)
    return finished.metrics[-1]


def recipe_to_resume(path: Path, recipe: TrainRecipe) -> TrainRecipe:
    """Return a recipe with the `reading` that was chosen when the unfinished run in a folder was started.

    Raises:
        RunError: the run in the folder has another recipe.
    """
    if not (path / RECIPE_FILE).is_file():
        return recipe
    begun = parse_config(TrainRecipe, load_recipe(path / RECIPE_FILE), str(path / RECIPE_FILE))
    _check_same(path, begun.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if not (path / CHECKPOINT_FILE).is_file():
        return recipe
    stores = read_provenance(path / PROVENANCE_FILE)["stores"]
    return recipe.model_copy(update={"reading": stores[0]["reading"]}) if stores else recipe


def fixed_provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a run's provenance that must not change before the run is resumed."""
    fixed: dict[str, Any] = {name: provenance.get(name) for name in FIXED_PROVENANCE}
    stores = [{**store, "views": None} for store in fixed["stores"]]
    return {**fixed, "stores": stores}


def check_provenance(path: Path, provenance: dict[str, Any]) -> None:
    """Check that stores, source and views are those that an unfinished run was started with.

    Raises:
        RunError: they are not; the message shows the differences.
    """
    begun = read_provenance(path / PROVENANCE_FILE)
    _check_same(path, fixed_provenance(begun), fixed_provenance(provenance))


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, until one is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _clear_partials(path: Path) -> None:
    for folder in (path, path / CHECKPOINTS_FOLDER):
        for partial in partials(folder) if folder.is_dir() else ():
            partial.unlink()


def _forget_checkpoints(path: Path, epochs: int) -> None:
    """Remove the weights that were kept after more than a number of epochs, which are trained again."""
    for epoch in kept_epochs(path):
        if epoch > epochs:
            checkpoint_file(path, epoch).unlink()


def _check_same(path: Path, begun: Any, now: Any) -> None:
    if begun != now:
        table = difference_table(begun, now, "started with", "now")
        raise RunError(
            f"run {str(path)!r} cannot be resumed, since it was started with other values.\n{table}\n"
            "Resume with the values it was started with, or choose another --out."
        )


def check_free(path: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Check that a folder is empty, or holds a run that may be replaced or resumed.

    Raises:
        RunError: the folder holds something else.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{str(path)!r} is a file, expected a folder for the run: choose another --out")
    if not path.is_dir():
        return
    if set(path.iterdir()) <= {*partials(path), path / LOCK_FILE}:  # left by a killed process
        return
    if not (path / RECIPE_FILE).is_file():
        raise RunError(f"{str(path)!r} is not empty and not a run: choose another --out")
    if not (overwrite or resume):
        raise RunError(
            f"{str(path)!r} already holds a run: choose another --out, continue it with --resume, or "
            "remove it (`distill train` has --overwrite)"
        )


def _clear(path: Path) -> None:
    """Remove a run's files, the recipe last, so that an interrupted removal leaves a run to overwrite."""
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name not in (RECIPE_FILE, LOCK_FILE):
            child.unlink()
    (path / RECIPE_FILE).unlink()


def student_folders(path: Path, recipe: TrainRecipe) -> list[Path]:
    """Return the folder of every student of a run: the run's own, or those in a group's."""
    return [path / str(index) for index in range(1 + len(recipe.peers))] if recipe.peers else [path]


def is_finished(path: Path, recipe: TrainRecipe) -> bool:
    """Return true if a folder holds the final weights of every student of a recipe."""
    return all((folder / WEIGHTS_FILE).is_file() for folder in student_folders(path, recipe))


def load_runs(path: Path) -> list[FinishedRun]:
    """Read a finished run, or those of every student of a group and then of their ensembles.

    Raises:
        RunError: there is no run, or it is unfinished.
    """
    if not is_group(path):
        return [load_run(path)]
    recipe = read_recipe(path)
    runs = [load_run(folder) for folder in student_folders(path, recipe)]
    metrics = read_metrics(path / METRICS_FILE)
    for name in sorted(metrics[-1].get("ensembles", {})):
        lines = [
            {**line, "evaluation": line["ensembles"][name]} if name in line.get("ensembles", {}) else line
            for line in metrics
        ]
        runs.append(FinishedRun(path, recipe, lines, name))
    return [*runs, FinishedRun(path, recipe, metrics, "ensemble")]


def is_group(path: Path) -> bool:
    """Return true if a folder holds a group of students rather than one."""
    return (path / RECIPE_FILE).is_file() and (path / "0" / RECIPE_FILE).is_file()


def load_run(path: Path) -> FinishedRun:
    """Read the recipe and metrics of a finished run of one student.

    Raises:
        RunError: there is no run, it is unfinished, or it is a group of students.
    """
    if not (path / RECIPE_FILE).is_file():
        raise RunError(f"there is no run at {str(path)!r}. Make one with `distill train ... --out {path}`.")
    if is_group(path):
        folders = ", ".join(map(str, student_folders(path, read_recipe(path))))
        raise RunError(f"{str(path)!r} is the run of several students, expected one of them: {folders}")
    if not (path / WEIGHTS_FILE).is_file():
        raise RunError(
            f"run {str(path)!r} is unfinished: continue it with --resume, or replace it with --overwrite"
        )
    return FinishedRun(path, read_recipe(path), read_metrics(path / METRICS_FILE))


def read_recipe(path: Path) -> TrainRecipe:
    """Return the recipe of a run, finished or not.

    Raises:
        RecipeError: the file cannot be read, or is not a recipe.
    """
    file = path / RECIPE_FILE
    return parse_config(TrainRecipe, upgrade_recipe(load_recipe(file)), str(file))
