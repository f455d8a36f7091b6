"""Students of teachers that were trained on some of the classes each, by how these are unified.

    python benchmarks/classes.py [--json FILE] [--quick]

Three teachers (mlp, cnn, resnet) are trained on the digits 0 to 3, 3 to 6, and 6 to 9 with 0, so that each
two have one class in common, and have never seen the others. Their stores have all training digits. Students
see 300 of these and no labels, but in rows that say so. Rows `full` learn from the same three networks,
trained on all classes. Settings are otherwise those of `benchmarks/methods.py`, with ten paired seeds.

`targets` are the unified targets themselves: how often their largest probability is the label's, over all
training digits in one view, and their divergence from the mixture of the full teachers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _harness import arguments, exact, report
from methods import CPU, KD, TEACHERS, Entry, recipe, rows_of, study

from coursepack.data import open_source, view_recipe
from coursepack.data.store import StoreReader
from coursepack.distill.fusion.unify import Unify, UnifyConfig
from coursepack.distill.recipe import TrainRecipe
from coursepack.distill.runs.train import train
from coursepack.kernels import decode, soft_targets
from coursepack.models import TeacherRunner, load_teacher
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from collections.abc import Sequence

THIRDS = ((0, 1, 2, 3), (3, 4, 5, 6), (0, 6, 7, 8, 9))
SOME, FULL = (0, 1, 2), (3, 4, 5)
FORMS = {
    "naive": "mean",
    "ce": "cross_entropy",
    "mf": "factorization",
    "mf-logits": "logit_factorization",
}
TEMPERATURES = (1.0, 4.0, 20.0)
UNLABELLED = {"soft_weight": 1.0, "hard_weight": 0.0}
LABELLED = {name: KD[name] for name in ("soft_weight", "hard_weight")}
EQUAL_SCALES = 1e6
"""Ridge that keeps v at one."""
NOTE = "teachers that know 4, 4 and 5 of 10 classes, students without labels but where a row says so"
AGAINST = "naive"


def entries(*, quick: bool) -> list[Entry]:
    """Return the rows of the study."""
    made = [Entry(name, f"uhc-{name}", {}, SOME) for name in FORMS]
    made.append(Entry("full", "kd", UNLABELLED, FULL))
    if quick:
        return made
    sharp = {"temperature": 1.0}
    made += [Entry(f"{name}, T = 1", f"uhc-{name}", sharp, SOME) for name in ("naive", "ce")]
    made.append(Entry("mf-logits, v = 1", "uhc-mf-logits", {"fusion": {"ridge": EQUAL_SCALES}}, SOME))
    made += [Entry(f"{name}, labels", f"uhc-{name}", LABELLED, SOME) for name in ("naive", "ce")]
    return [*made, Entry("full, labels", "kd", {}, FULL), Entry("labels alone", "supervised", {}, ())]


def write_digits(folder: Path, known: Sequence[int]) -> None:
    """Write the digits of some classes as a source `arrays`, with labels from 0."""
    for split in ("train", "test"):
        source = open_source(f"digits:{split}")
        chosen = np.flatnonzero(np.isin(source.labels, known))
        (folder / split).mkdir(parents=True)
        np.save(folder / split / "images.npy", source.images[chosen])
        np.save(folder / split / "labels.npy", np.searchsorted(known, source.labels[chosen]))
        (folder / split / "classes.json").write_text(json.dumps([str(label) for label in known]))


def train_teacher(folder: Path, network: str, known: Sequence[int] | None, *, quick: bool) -> Path:
    """Train a teacher on the digits of some classes, or on all, and return its run folder."""
    fields: dict[str, Any] = {"student": f"digits-{network}", "limit": 64 if quick else None}
    if known is not None:
        write_digits(folder / "digits", known)
        fields |= {"source": "arrays:train", "evaluation": "arrays:test", "root": str(folder / "digits")}
    made = recipe(Entry("teacher", "supervised", {}, ()), [], 0, 1 if quick else 25, **fields)
    made = TrainRecipe.model_validate({**made.model_dump(), "optimizer": {"lr": 0.05}})
    train(made, folder / "run", device=CPU)
    return folder / "run"


def write_store(path: Path, run: Path, known: Sequence[int] | None, views: int) -> Path:
    """Write the store of a teacher over all training digits."""
    source = open_source("digits")
    columns = None if known is None else [known.index(c) if c in known else None for c in range(10)]
    network = load_teacher(f"run:{run}", source.class_names, columns=columns)
    runner = TeacherRunner(network, columns=columns)
    run_job(Job(path, source, view_recipe("digits"), runner, views), quiet=True)
    return path


def targets(stores: Sequence[Path]) -> list[dict[str, Any]]:
    """Return how right the unified targets of all training digits are, and how near the full teachers'."""
    labels, rows = torch.from_numpy(open_source("digits").labels), []
    readers = [StoreReader(store) for store in stores]
    logits = [decode(reader.rows("logits", 0, np.arange(len(labels)))) for reader in readers]
    known = [readers[index].manifest.known_classes for index in SOME]
    for temperature in TEMPERATURES:
        full = soft_targets(torch.stack([logits[k] for k in FULL]).double(), temperature=temperature)
        unified = {
            name: Unify(UnifyConfig(form=form), known, 10).unify([logits[k] for k in SOME], temperature)
            for name, form in FORMS.items()
        }
        found = {name: (each.double() / temperature).softmax(1) for name, each in unified.items()}
        for name, probs in [*found.items(), ("full", full)]:
            right = 100 * float((probs.argmax(1) == labels).double().mean())
            rows.append(exact(f"targets: {name}, right at T = {temperature:g}", right, "%", {}))
            if name != "full":
                away = float((full * (full.log() - probs.log())).sum(1).mean())
                rows.append(exact(f"targets: {name}, KL at T = {temperature:g}", away, "nats", {}))
    return rows


def main() -> None:
    options = arguments("Students of teachers that know different classes.").parse_args()
    quick = options.quick
    seeds, epochs, views, limit = (2, 1, 1, 64) if quick else (10, 40, 8, 300)
    with tempfile.TemporaryDirectory() as name:
        folder, stores = Path(name), []
        for kind, sets in (("some", THIRDS), ("full", (None,) * 3)):
            for network, known in zip(TEACHERS, sets, strict=True):
                own = folder / kind / network
                run = train_teacher(own, network, known, quick=quick)
                stores.append(write_store(own / f"{network}-{kind}.zarr", run, known, views))
        told, refused = study("classes", stores, seeds, epochs, entries(quick=quick), limit)
        assert not refused
        rows = [*rows_of("classes", told, NOTE, AGAINST), *targets(stores)]
    report("Students of teachers that know different classes", rows, options.json)


if __name__ == "__main__":
    main()
