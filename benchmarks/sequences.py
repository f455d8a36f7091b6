"""Accuracy of students of 300 digits that learn from teachers in sequence, or become teachers themselves.

    python benchmarks/sequences.py [--json FILE] [--quick]

Each section compares its rows with one of them, with ten paired seeds: the same initial weights, samples and
order. Only generations have new weights, as in their paper. Students, teachers and settings are those of
`benchmarks/methods.py`.

    takd          a student of 4,810 weights from a resnet of 169,578, direct or through one or two assistants
                  (cnn of 13,706; mlp of 50,826, then cnn), which learn from the same 300 digits
    generations   born-again networks: each generation is the teacher of the next, the first from labels
    path          a resnet's checkpoints in order (pro-kd) against its last one
    sequence      three teachers one after the other against their mixture
    monitored     teachers that count where they are right, in the settings of benchmarks/methods.py
    tf-kd         a virtual teacher, or the student itself, against label smoothing

Assistants and generations are trained anew with every seed, and their stores are written for it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _harness import arguments, report
from methods import (
    ALL,
    CPU,
    FIGURES,
    NOTES,
    Entry,
    Found,
    recipe,
    rows_of,
    study,
    train_student,
    train_teachers,
    write_stores,
)

from coursepack.console import inform
from coursepack.data import open_source, view_recipe
from coursepack.distill.runs.train import train
from coursepack.models import TeacherRunner, load_teacher
from coursepack.models.run_specs import kept_epochs
from coursepack.precompute import Job, run_job
from coursepack.precompute.several import run_jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coursepack.distill.recipe import TrainRecipe
    from coursepack.models import Network

    Rows = Iterator[tuple[str, dict[str, float]]]

TEACHER_LR, ASSISTANT_LR = {"lr": 0.05}, {"lr": 0.02}
"""Optimizers of a teacher from labels, as in the study, and of assistants: at 0.05 the cnn learns nothing
from soft targets at T = 4."""
COOLING = {"shape": "warmup", "start": 4.0, "end": 1.0, "epochs": 30}
MONITORED = [
    Entry("kd", "kd", {}),
    Entry("ka-ps", "ka-ps", {}),
    Entry("ca-mkd", "ca-mkd", {"soft_weight": 0.9, "hard_weight": 0.1}),
    Entry("monitored", "monitored", {}),
    Entry("monitored-better", "monitored", {"fusion": {"rule": "better"}}),
]


def sequence_entries(epochs: int) -> list[Entry]:
    """Return the rows of section `sequence`, for a run of some epochs."""
    return [
        Entry("kd", "kd", {}),
        Entry("kd-from-last", "kd", {}, (2,)),
        Entry("sequence", "sequence", {}),
        Entry("sequence-backwards", "sequence", {}, ALL[::-1]),
        Entry("sequence-cooling", "sequence", {"temperature": COOLING}),
        Entry("sequence-labels", "sequence", {"fusion": {"label_epochs": epochs // 4}}),
    ]


def path_entries(checkpoints: int) -> list[Entry]:
    """Return the rows of section `path`, for a teacher with some checkpoints."""
    every, last = tuple(range(checkpoints)), (checkpoints - 1,)
    return [
        Entry("kd-from-last", "kd", {}, last),
        Entry("kd-from-last-cooling", "kd", {"temperature": COOLING}, last),
        Entry("kd-from-all", "kd", {}, every),
        Entry("sequence", "sequence", {}, every),
        Entry("pro-kd", "pro-kd", {}, every),
    ]


class Bench:
    """Sizes of the study, and the stores that its sections share."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.seeds, self.epochs, self.views, self.limit = (2, 4, 1, 64) if quick else (10, 40, 8, 300)
        self.runs = train_teachers(folder / "teachers", quick)
        self.stores = {
            setting: write_stores(folder, runs, setting, self.views)[0]
            for setting, runs in self.runs.items()
            if setting == "plain" or (setting != "presets" and not quick)
        }

    def recipe(self, entry: Entry, stores: list[Path], seed: int, **fields: Any) -> TrainRecipe:
        """Return the recipe of a student."""
        fields = {"views": self.views, "limit": self.limit, **fields}
        return recipe(entry, stores, seed, self.epochs, **fields)

    def student(
        self, name: str, method: str, store: Path | None, seed: int, **fields: Any
    ) -> tuple[dict[str, float], Network]:
        """Train a student from the store of one teacher, or from labels."""
        objective = fields.pop("objective", {})
        entry = Entry(name, method, objective, () if store is None else (0,))
        made = self.recipe(entry, [] if store is None else [store], seed, **fields)
        return train_student(made, name)

    def store(self, network: Network, name: str) -> Path:
        """Write the store of a network that has just been trained."""
        path = self.folder / f"{name}.zarr"
        run_job(
            Job(path, open_source("digits"), view_recipe("digits"), TeacherRunner(network), self.views),
            quiet=True,
        )
        return path

    def study(self, setting: str, stores: list[Path], entries: list[Entry]) -> Found:
        """Measure the rows of a section whose teachers are the same for all seeds."""
        told, refused = study(setting, stores, self.seeds, self.epochs, entries, self.limit)
        assert not refused
        return told

    def each_seed(self, section: str, rows_of_seed: Callable[[Bench, int], Rows]) -> Found:
        """Measure the rows of a section whose teachers are trained with every seed."""
        told: Found = {}
        for seed in range(self.seeds):
            for name, values in rows_of_seed(self, seed):
                found = told.setdefault(name, {figure: [] for figure in FIGURES})
                for figure in FIGURES:
                    found[figure].append(values[figure])
        for name, found in told.items():
            inform(f"{section} {name}: {np.mean(found['accuracy']):.2%}")
        return told


def takd(bench: Bench, seed: int) -> Rows:
    """Yield a student of the largest teacher, direct and through assistants."""
    teacher = bench.stores["plain"][-1]
    yield "direct", bench.student("direct", "kd", teacher, seed)[0]
    for name, path in {"one-assistant": ("cnn",), "two-assistants": ("mlp", "cnn")}.items():
        store = teacher
        for network in path:
            fields = {"student": f"digits-{network}", "optimizer": ASSISTANT_LR}
            values, assistant = bench.student(f"{name} {network}", "kd", store, seed, **fields)
            store = bench.store(assistant, f"takd/{name}-{network}-{seed}")
            yield f"{name}-{network}", values
        yield name, bench.student(name, "kd", store, seed)[0]


def generations(bench: Bench, seed: int) -> Rows:
    """Yield the generations of a born-again network, each with a new seed, and the first with labels too."""
    values, network = bench.student("from-labels", "supervised", None, seed)
    yield "from-labels", values
    first = store = bench.store(network, f"generations/0-{seed}")
    for generation in (1, 2, 3):
        values, network = bench.student("born-again", "born-again", store, seed + 100 * generation)
        yield f"generation-{generation}", values
        if generation < 3:
            store = bench.store(network, f"generations/{generation}-{seed}")
    labels = {"hard_weight": 1.0}
    yield (
        "generation-1-labels",
        bench.student("born-again", "born-again", first, seed + 100, objective=labels)[0],
    )


def tf_kd(bench: Bench, seed: int) -> Rows:
    """Yield students of labels, smoothed labels, a virtual teacher, and themselves."""
    values, network = bench.student("from-labels", "supervised", None, seed)
    yield "from-labels", values
    smoothed = {"label_smoothing": 0.1}
    yield "label-smoothing", bench.student("smoothed", "supervised", None, seed, objective=smoothed)[0]
    yield "tf-kd", bench.student("tf-kd", "tf-kd", None, seed)[0]
    store = bench.store(network, f"self-{seed}")
    # The weights of both objectives are small, so that they take a larger rate.
    rate = {"lr": 1.0}
    strong = {"hard_weight": 0.05, "terms": {"virtual_teacher": {"weight": 0.95}}}
    yield "tf-kd-0.95", bench.student("tf-kd-0.95", "tf-kd", None, seed, objective=strong, optimizer=rate)[0]
    yield "tf-kd-self", bench.student("tf-kd-self", "tf-kd-self", store, seed, optimizer=rate)[0]


def path_stores(bench: Bench) -> list[Path]:
    """Train a resnet, and write the stores of its checkpoints, every fifth epoch."""
    run, (epochs, every) = bench.folder / "path", (2, 1) if bench.quick else (25, 5)
    supervised = Entry("path", "supervised", {}, ())
    fields = {"student": "digits-resnet", "optimizer": TEACHER_LR, "limit": 64 if bench.quick else None}
    made = bench.recipe(supervised, [], 0, **fields, keep_checkpoints=every)
    train(made.model_copy(update={"epochs": epochs, "views": None}), run, device=CPU)
    source, jobs = open_source("digits"), []
    for epoch in kept_epochs(run):
        runner = TeacherRunner(load_teacher(f"run:{run}@{epoch}", source.class_names))
        jobs.append(
            Job(bench.folder / f"path-{epoch}.zarr", source, view_recipe("digits"), runner, bench.views)
        )
    run_jobs(jobs, quiet=True)
    return [job.store for job in jobs]


def sections(bench: Bench) -> list[dict[str, Any]]:
    """Measure all sections."""
    rows = rows_of("takd", bench.each_seed("takd", takd), "resnet to digits-small", "direct")
    told = bench.each_seed("generations", generations)
    rows += rows_of("generations", told, "digits-small to itself", "from-labels")
    path = path_stores(bench)
    told = bench.study("path", path, path_entries(len(path)))
    rows += rows_of("path", told, f"{len(path)} checkpoints of a resnet", "kd-from-last")
    told = bench.study("sequence", bench.stores["plain"], sequence_entries(bench.epochs))
    rows += rows_of("sequence", told, "mlp, cnn and resnet", "kd")
    for setting, stores in bench.stores.items():
        name = f"monitored-{setting}"
        rows += rows_of(name, bench.study(name, stores, MONITORED), NOTES[setting], "monitored")
    told = bench.each_seed("tf-kd", tf_kd)
    return rows + rows_of("tf-kd", told, "no other teacher", "label-smoothing")


def main() -> None:
    chosen = arguments("What sequences of teachers do for a student of 300 digits.").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = sections(Bench(Path(folder), quick=chosen.quick))
    report("Students of 300 digits, accuracy on the test digits (mean, 95 % interval)", rows, chosen.json)


if __name__ == "__main__":
    main()
