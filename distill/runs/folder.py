"""A run's folder: the recipe as used, where its targets came from, metrics per epoch, weights.

recipe.yaml          trains this run again
provenance.json      fingerprints of the stores it read, library versions, device
network.yaml         what `run:FOLDER` needs to build the student
metrics.jsonl        one line per epoch
best.safetensors     the student's weights after the evaluation with the best accuracy
checkpoint.pt        while a run is unfinished, all it needs to go on
lock                 while a process trains it, which process that is
student.safetensors  the student's weights after the last epoch; its presence says the run is finished
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
from coursepack.distill.renamed import upgraded
from coursepack.distill.runs.records import read_metrics, read_provenance
from coursepack.distill.training.checkpoint import CHECKPOINT_FILE
from coursepack.errors import RunBusy, RunError
from coursepack.files import naming, partials, write_whole
from coursepack.locks import FileLock, Held
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coursepack.models import Network

RECIPE_FILE = "recipe.yaml"
PROVENANCE_FILE = "provenance.json"
METRICS_FILE = "metrics.jsonl"
BEST_FILE = "best.safetensors"
LOCK_FILE = "lock"
BOARD_FOLDER = "tensorboard"
OWN_FILES = (RECIPE_FILE, PROVENANCE_FILE, NETWORK_FILE, METRICS_FILE, BEST_FILE, CHECKPOINT_FILE)
"""Files of a run that is unfinished."""

MUST_STAY = ("stores", "view_fingerprint", "source_fingerprint", "views", "window")
"""Parts of the provenance in which a run that is resumed may not differ; but a store may have more views by
then, as long as they are not the run's."""


@dataclass(frozen=True)
class FinishedRun:
    """What is kept of a run."""

    path: Path
    recipe: TrainRecipe
    metrics: list[dict[str, Any]]
    """One entry per epoch."""


class RunFolder:
    """The folder of a run that this process trains, locked against other processes until it is closed."""

    def __init__(self, path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Make the folder where there is none, and lock it.

        Args:
            path: the folder.
            overwrite: whether it may hold a run that will be replaced.
            resume: whether it may hold a run that is unfinished.

        Raises:
            RunError: the folder cannot be made, or holds something else.
            RunBusy: another process trains this run.
        """
        self.path = path
        check_free(path, overwrite=overwrite, resume=resume)
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the run's folder {str(path)!r}: {error.strerror}. Choose another --out."
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
        """Folders that were made for this run; None where it was there before."""
        try:
            # Once more, since another process may have trained it meanwhile.
            check_free(path, overwrite=overwrite, resume=resume)
            if (path / WEIGHTS_FILE).is_file() and not overwrite:
                raise RunError(f"run {str(path)!r} was finished by another process just now")
        except BaseException:
            self.close()
            raise
        if not (path / RECIPE_FILE).is_file():
            self._made = missing

    def begin(
        self, recipe: TrainRecipe, provenance: dict[str, Any], network: Network, *, overwrite: bool
    ) -> None:
        """Write what describes the run, in the place of one that was begun before or is overwritten."""
        path = self.path
        _clear_partials(path)
        if overwrite and (path / RECIPE_FILE).is_file():
            _clear(path)
            self._made = []
        (path / BEST_FILE).unlink(missing_ok=True)
        write_whole(path / RECIPE_FILE, write_yaml(recipe.model_dump(mode="json")).encode())
        write_whole(path / PROVENANCE_FILE, canonical_json(provenance, indent=1).encode())
        write_whole(path / NETWORK_FILE, write_yaml(network.describe()).encode())
        (path / METRICS_FILE).write_bytes(b"")

    def reopen(self, epoch: int) -> None:
        """Go on with an unfinished run from an epoch; what it logged of that and later ones is dropped."""
        path = self.path
        _clear_partials(path)
        lines = (path / METRICS_FILE).read_bytes().splitlines(keepends=True)
        write_whole(path / METRICS_FILE, *lines[:epoch])

    def close(self, *, keep: bool = True) -> None:
        """Unlock the folder; without `keep`, remove it if it was made for this run."""
        if not keep and self._made is not None:
            shutil.rmtree(self.path / BOARD_FOLDER, ignore_errors=True)
            for file in (*(self.path / name for name in OWN_FILES), *partials(self.path)):
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
            os.fsync(file.fileno())  # a checkpoint that counts on this line reaches the disk after it

    def keep_best(self, network: Network) -> None:
        """Write the weights of the best student so far."""
        write_whole(self.path / BEST_FILE, _weights(network))

    def finish(self, network: Network) -> None:
        """Write the last weights, and clear away what an unfinished run needs."""
        write_whole(self.path / WEIGHTS_FILE, _weights(network))
        (self.path / CHECKPOINT_FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class OthersFolder:
    """A run that another rank writes."""

    path: Path

    def close(self, *, keep: bool = True) -> None:
        """Nothing to give up."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Write nothing."""

    def keep_best(self, network: Network) -> None:
        """Write nothing."""

    def finish(self, network: Network) -> None:
        """Write nothing."""


def _weights(network: Network) -> bytes:
    state = {name: value.detach().cpu().contiguous() for name, value in network.module.state_dict().items()}
    return save(state)


def finished_metrics(path: Path, recipe: TrainRecipe) -> dict[str, Any] | None:
    """The last metrics of a run that is finished; None where it is not.

    Raises:
        RunError: it is a run of another recipe.
    """
    if not (path / WEIGHTS_FILE).is_file():
        return None
    finished = load_run(path)
    _check_same(path, finished.recipe.model_dump(mode="json"), recipe.model_dump(mode="json"))
    (path / CHECKPOINT_FILE).unlink(missing_ok=True)  # a kill just before that leaves it
    _clear_partials(path)
    return finished.metrics[-1]


def as_begun(path: Path, recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with what was decided when an unfinished run was begun: how its stores are read.

    Raises:
        RunError: it is a run of another recipe.
    """
    if not (path / RECIPE_FILE).is_file():
        return recipe
    begun = parse_config(TrainRecipe, load_recipe(path / RECIPE_FILE), str(path / RECIPE_FILE))
    _check_same(path, begun.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if not (path / CHECKPOINT_FILE).is_file():
        return recipe
    stores = read_provenance(path / PROVENANCE_FILE)["stores"]
    return recipe.model_copy(update={"reading": stores[0]["reading"]}) if stores else recipe


def lasting(provenance: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's provenance in which it may not differ when it is resumed."""
    facts: dict[str, Any] = {name: provenance.get(name) for name in MUST_STAY}
    stores = [{**store, "views": None} for store in facts["stores"]]
    return {**facts, "stores": stores}


def check_begun(path: Path, provenance: dict[str, Any]) -> None:
    """Refuse to resume a run whose stores, source or views are not those that it was begun with.

    Raises:
        RunError: the text says what differs.
    """
    begun = read_provenance(path / PROVENANCE_FILE)
    _check_same(path, lasting(begun), lasting(provenance))


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, as far as they hold nothing."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _clear_partials(path: Path) -> None:
    for partial in partials(path):
        partial.unlink()


def _check_same(path: Path, begun: Any, now: Any) -> None:
    if begun != now:
        table = difference_table(begun, now, "begun with", "now")
        raise RunError(
            f"run {str(path)!r} cannot be resumed, since it was begun with something else.\n{table}\n"
            "Resume with what it was begun with, or choose another --out."
        )


def check_free(path: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse a folder that holds something that is not to be replaced or resumed.

    Raises:
        RunError: the folder is not empty, and is not a run or may not be overwritten.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{str(path)!r} is a file, expected a folder for the run: choose another --out")
    if not path.is_dir():
        return
    if set(path.iterdir()) <= {*partials(path), path / LOCK_FILE}:  # what a kill leaves of a new folder
        return
    if not (path / RECIPE_FILE).is_file():
        raise RunError(f"{str(path)!r} is not empty and not a run: choose another --out")
    if not (overwrite or resume):
        raise RunError(
            f"{str(path)!r} already holds a run: choose another --out, go on with it by --resume, or "
            "remove it (`distill train` has --overwrite)"
        )


def _clear(path: Path) -> None:
    """Remove a run, what says that it is one last: a kill leaves something that can be overwritten again."""
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name not in (RECIPE_FILE, LOCK_FILE):
            child.unlink()
    (path / RECIPE_FILE).unlink()


def load_run(path: Path) -> FinishedRun:
    """Read a finished run's recipe and metrics.

    Raises:
        RunError: there is no run, or it is unfinished.
    """
    if not (path / RECIPE_FILE).is_file():
        raise RunError(f"there is no run at {str(path)!r}. Make one with `distill train ... --out {path}`.")
    if not (path / WEIGHTS_FILE).is_file():
        raise RunError(f"run {str(path)!r} is unfinished: go on with --resume, or --overwrite it")
    recipe = parse_config(TrainRecipe, upgraded(load_recipe(path / RECIPE_FILE)), str(path / RECIPE_FILE))
    return FinishedRun(path, recipe, read_metrics(path / METRICS_FILE))
