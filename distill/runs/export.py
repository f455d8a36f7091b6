"""Export of finished students, with their preprocessing, class names and training in the files."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coursepack.data import open_source
from coursepack.distill.runs.folder import PROVENANCE_FILE, is_group, load_run
from coursepack.distill.runs.records import read_provenance
from coursepack.distill.training.evaluate import EVALUATION_VIEWS
from coursepack.errors import RunError, TeacherMismatch
from coursepack.imports import check_trusted
from coursepack.models import load_teacher
from coursepack.models.card import Card
from coursepack.models.export import FORMATS
from coursepack.models.run_specs import parse_run_spec
from coursepack.models.weights import weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.views import ViewRecipe
    from coursepack.distill.runs.folder import FinishedRun
    from coursepack.models import Network
    from coursepack.models.run_specs import RunSpec

IMAGES = 5
"""Number of random images on which an exported network is compared with the run."""
MOST = 1e-3
"""Largest difference of logits, relative to the largest logit, with which a file is kept."""


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    path: Path
    """The file, or the folder."""
    card: Card
    difference: float
    """Largest difference of logits from the run's, relative to the largest logit."""


def export_run(
    run: str, kind: str, out: Path | None = None, *, overwrite: bool = False, trust_code: bool = False
) -> Exported:
    """Write the student of a finished run in a format that other programs read.

    The file is loaded again and compared with the run on random images before it gets its name.

    Args:
        run: `FOLDER` for the weights after the last epoch, `FOLDER@best` for those with the best accuracy, or
            `FOLDER@EPOCH` for a checkpoint that was kept.
        kind: key in `FORMATS`.
        out: file, or for `hf` a folder. Defaults to the name of the run in the current folder.
        overwrite: replace existing files.
        trust_code: allow the run to name Python code for its student or its data.

    Raises:
        RunError: there is no finished run of one student, or `out` exists or cannot be made.
        RecipeError: the format cannot hold the student, or its libraries are missing.
        UntrustedCode: the run names Python code, and `trust_code` is false.
        TeacherMismatch: the exported network gives other logits than the run.
    """
    spec, form = parse_run_spec(run), FORMATS[kind]
    finished = load_run(spec.folder)
    path = _default_out(spec, form.suffix) if out is None else out
    _check_out(path, kind, overwrite=overwrite)
    class_names, crop = _classes_and_crop(finished, trust_code=trust_code)
    network = load_teacher(f"run:{run.removeprefix('run:')}", class_names, trust_code=trust_code)
    form.check(network)
    card = Card(network.spec, class_names, network.preprocessing, crop, _training(finished, spec, network))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        if not form.suffix:
            written.mkdir()
        form.write(network, card, written)
        difference = compare(network, form.reload(written, card))
        if difference > MOST:
            raise TeacherMismatch(
                f"the exported {kind} of network {network.spec!r} gives logits that differ by "
                f"{difference:.1e} of the largest, expected at most {MOST:.0e}: nothing was "
                "kept. Use another --format"
            )
        _move(written, path)
    return Exported(path, card, difference)


def compare(network: Network, exported: Network) -> float:
    """Return the largest difference of two networks' logits, relative to the largest logit."""
    pixels = network.preprocessing
    shape = (IMAGES, pixels.size, pixels.size, pixels.channels)
    images = pixels(torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    with torch.inference_mode():
        ours, theirs = (each.module.eval()(images) for each in (network, exported))
    scale = ours.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((ours - theirs).abs().max() / scale)


def _classes_and_crop(run: FinishedRun, *, trust_code: bool) -> tuple[tuple[str, ...], float]:
    """Return the names of the run's classes, and the share of an image that its evaluation crops.

    Runs of earlier releases did not record them: they are those of the run's data.
    """
    origin = read_provenance(run.path / PROVENANCE_FILE)
    names, is_whole = origin.get("class_names"), origin.get("whole_images")
    if names is None or is_whole is None:
        recipe = run.recipe
        name = check_trusted(recipe.evaluation, f"run {str(run.path)!r}", trust_code=trust_code)
        source = open_source(name, Path(recipe.root) if recipe.root else None)
        return source.class_names, _crop(EVALUATION_VIEWS[source.in_memory is not None])
    return tuple(names), _crop(EVALUATION_VIEWS[is_whole])


def _crop(view: ViewRecipe) -> float:
    values: dict[str, Any] = {}
    for op in view.ops:
        values |= op.model_dump()
    return float(values["size"] / values["shorter"]) if {"size", "shorter"} <= values.keys() else 1.0


def _training(run: FinishedRun, spec: RunSpec, network: Network) -> dict[str, Any]:
    """Return how the weights were made, for the card."""
    recipe = run.recipe
    weights = "best accuracy" if spec.best else "last epoch" if spec.epoch is None else f"epoch {spec.epoch}"
    return {
        "method": recipe.method,
        "weights": weights,
        "averaged": recipe.optimizer.ema is not None,
        "fingerprint": weights_fingerprint(network.module),
        "accuracy": None if network.record is None else network.record.accuracy,
        "evaluation": None if network.record is None else network.record.source,
    }


def _default_out(spec: RunSpec, suffix: str) -> Path:
    """Return the name of the run, with that of its group and of its weights, in the current folder."""
    folder = spec.folder.resolve()
    name = f"{folder.parent.name}-{folder.name}" if is_group(folder.parent) else folder.name
    weights = "-best" if spec.best else "" if spec.epoch is None else f"-epoch-{spec.epoch:04d}"
    return Path(f"{name}{weights}{suffix or '-hf'}")


def _check_out(path: Path, kind: str, *, overwrite: bool) -> None:
    suffix = FORMATS[kind].suffix
    if suffix and path.suffix != suffix:
        raise RunError(f"--format {kind} writes a file whose name ends in {suffix}, got --out {str(path)!r}")
    if not path.parent.is_dir():
        raise RunError(
            f"{str(path)!r} cannot be made, since there is no folder {str(path.parent)!r}: choose another "
            "--out"
        )
    if path.exists() and path.is_dir() == bool(suffix):
        found, expected = ("folder", "file") if suffix else ("file", "folder")
        raise RunError(f"{str(path)!r} is a {found}, expected a {expected}: choose another --out")
    existing = [path.with_suffix(".json")] if kind == "safetensors" else []
    taken = [str(each) for each in (path, *existing) if each.is_file()]
    if not suffix and path.is_dir() and any(path.iterdir()):
        taken = [str(path)]
    if taken and not overwrite:
        raise RunError(f"{' and '.join(map(repr, taken))} exists: choose another --out, or give --overwrite")


def _move(written: Path, path: Path) -> None:
    """Move what was written to its name, replacing existing files."""
    if written.is_dir():
        path.mkdir(exist_ok=True)
    files: Sequence[Path] = sorted(written.iterdir() if written.is_dir() else written.parent.iterdir())
    target = path if written.is_dir() else path.parent
    for file in files:
        file.replace(target / file.name)
