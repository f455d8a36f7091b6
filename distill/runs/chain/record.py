"""Records of a chain's stages: recipe, inputs and result of each.

NAME              run folder of a stage that trains
NAME.zarr         store of a stage that precomputes
NAME.teacher.yaml, NAME.view.yaml   file of `precompute run` for it, and its view recipe
NAME.json         record of a stage, written before it starts and again when it is finished
chain.lock        lock of the process that runs the chain
"""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING, Any

from coursepack.canonical import canonical_json, difference_table
from coursepack.config import Config, parse_config
from coursepack.data.store import load_manifest
from coursepack.distill.runs.chain.plan import run_folder, store_folder
from coursepack.distill.runs.chain.planned import stored_output
from coursepack.errors import RunError
from coursepack.files import partials, write_whole
from coursepack.models.build import WEIGHTS_FILE
from coursepack.models.run_specs import checkpoint_file, kept_epochs
from coursepack.parsing import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.distill.runs.chain.plan import Stage

LOCK = "chain.lock"
REMOVED = ".removed"
"""Suffix of a folder that is being removed."""


class StageRecord(Config):
    """Record of one stage."""

    stage: str
    """Name of the stage."""
    identity: dict[str, Any]
    """Recipe of the stage, and fingerprints of everything that it reads."""
    output: dict[str, Any] | None = None
    """What determines the result of the stage; None until it is finished."""
    metrics: dict[str, float] | None = None
    """Metrics of the evaluation after the last epoch, or of the ensemble."""


def record_file(out: Path, name: str) -> Path:
    """Return the file of a stage's record."""
    return out / f"{name}.json"


def read_record(out: Path, name: str) -> StageRecord | None:
    """Return the record of a stage, or None if the stage was never started.

    Raises:
        RunError: the record is damaged.
    """
    path = record_file(out, name)
    if not path.is_file():
        return None
    try:
        return parse_config(StageRecord, read_json(path, RunError), str(path))
    except ValueError as error:
        raise RunError(
            f"{error}\nRemove it together with the stage's folder, or choose another --out"
        ) from error


def write_record(out: Path, record: StageRecord) -> None:
    """Write the record of a stage."""
    text = canonical_json(record.model_dump(mode="json"), indent=1)
    write_whole(record_file(out, record.stage), text.encode())


def output_folder(out: Path, stage: Stage) -> Path | None:
    """Return the folder of a stage's result; None for stages whose record is their result."""
    if stage.kind == "ensemble":
        return None
    return (run_folder if stage.kind == "train" else store_folder)(out, stage.name)


def output_of(out: Path, stage: Stage) -> dict[str, Any] | None:
    """Return what determines the values of a stage's result; None if there is none or it is unfinished."""
    folder = output_folder(out, stage)
    if folder is None:
        return {}
    if stage.kind == "train":
        return _run_output(folder)
    if not (folder / "manifest.json").is_file():
        return None
    return stored_output(load_manifest(folder))


def _run_output(folder: Path) -> dict[str, Any] | None:
    """Return the fingerprints of a run's final weights and kept checkpoints; None if it is unfinished."""
    final = weights_output(folder)
    if final is None:
        return None
    kept = {str(epoch): weights_output(folder, epoch) for epoch in kept_epochs(folder)}
    return {**final, "checkpoints": kept} if kept else final


def is_written(out: Path, stage: Stage) -> bool:
    """Return true if the store of a stage that precomputes has all of its views."""
    folder = store_folder(out, stage.name)
    if not (folder / "manifest.json").is_file():
        return False
    wanted: int = stage.recipe["views"]
    return len(load_manifest(folder).committed_views()) >= wanted


def output_read(out: Path, stage: Stage, epoch: int | None) -> dict[str, Any] | None:
    """Return what determines what a later stage reads of a stage: of a run, its weights after an epoch."""
    if stage.kind == "train":
        return weights_output(run_folder(out, stage.name), epoch)
    return output_of(out, stage)


def weights_output(folder: Path, epoch: int | None = None) -> dict[str, Any] | None:
    """Return the fingerprint of a run's weights after an epoch or the last one; None if there are none."""
    path = folder / WEIGHTS_FILE if epoch is None else checkpoint_file(folder, epoch)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return {"weights": hashlib.file_digest(file, "sha256").hexdigest()}


def remove_output(out: Path, stage: Stage) -> None:
    """Remove the result of a stage. An interrupted removal leaves no part of it under its name."""
    for folder in (run_folder(out, stage.name), store_folder(out, stage.name)):
        if folder.exists():
            removed = folder.with_name(folder.name + REMOVED)
            folder.rename(removed)
            shutil.rmtree(removed)


def sweep(out: Path) -> None:
    """Remove what an interrupted chain left: partial records, and folders that were being removed."""
    for partial in partials(out):
        partial.unlink()
    for folder in out.glob(f"*{REMOVED}"):
        shutil.rmtree(folder)


def changes(record: StageRecord, identity: dict[str, Any], output: Any) -> str:
    """Return a table of the differences between a record and the stage now; empty if there are none."""
    begun = {**record.identity, **({} if record.output is None else {"output": record.output})}
    now = {**identity, **({} if record.output is None else {"output": output})}
    if canonical_json(begun) == canonical_json(now):
        return ""
    when = "started with" if record.output is None else "finished with"
    return difference_table(begun, now, when, "now")
