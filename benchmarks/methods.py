"""Accuracy of students of 300 labelled digits by distillation method and setting.

    python benchmarks/methods.py [--section study|cost] [--settings NAME ...] [--json FILE] [--quick]

Section `study`, the default, measures accuracies, and section `cost` the training steps and views of every
method (see `_methods_cost`).

In the study, three different teachers are trained, and their stores are written once; every student is
trained from the stores. Methods are paired by seed: the same initial weights, samples and order. Besides the
plain study, there are settings that favour particular methods: a weak and a noisy teacher with a good one,
teachers that each know only some classes, overconfident teachers, and a teacher that confuses two classes.
Every method uses the temperature and the soft and hard weights of `kd`, unless its row has `preset`, so that
a row shows the effect of the method alone. In the setting `presets`, every method has its own numbers (see
`_methods_presets`). Students that diverge count as untrained, and rows say how many did. The t-test and the
95 % interval (t distribution) are of the differences from `kd` with the same seeds.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _harness import arguments, exact, report, row
from _methods_cost import FULL, QUICK, costs
from _methods_presets import LEARNING_RATE, TAPS, presets
from _methods_presets import STUDENT as CONVOLUTIONAL
from scipy import stats

from coursepack.allocator import keep_freed_memory
from coursepack.console import inform, print_table
from coursepack.data import open_source, view_recipe
from coursepack.data.store import StoreReader
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.evaluate import evaluate
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError, TrainingDiverged
from coursepack.models import TeacherRunner, load_teacher, parse_tap
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.models import Network

CPU = torch.device("cpu")
STUDENT = "digits-small"
TEACHERS = {"mlp": ("hidden1", "hidden2"), "cnn": ("conv2", "hidden"), "resnet": ("layer1", "layer2:pooled")}
KD: dict[str, Any] = {"soft_weight": 0.9, "hard_weight": 0.1, "temperature": 4.0}
FLSW = {"kind": "flsw", "slope": 4.0, "gamma": 1.0, "lowest": 1.0, "highest": 20.0}
ALL = (0, 1, 2)
NO_SPREAD = 1e-9
"""Range of differences, in points, below which they are equal but for rounding."""
FIGURES = ("accuracy", "nll", "calibration_error", "seconds", "diverged")
Found = dict[str, dict[str, list[float]]]
"""Figures of every seed, by row and name."""


@dataclass(frozen=True)
class Entry:
    """One row of a study."""

    name: str
    method: str
    objective: dict[str, Any]
    teachers: tuple[int, ...] = ALL


def entries(setting: str, names: tuple[str, ...] | None = None) -> list[Entry]:
    """Return all rows of a setting, or those with the given names."""
    if setting == "presets":
        made = [Entry(name, name, *rest) for name, *rest in presets(list(TEACHERS))]
        return [entry for entry in made if names is None or entry.name in names]
    made = [
        Entry("plain", "supervised", {}, ()),
        Entry("kd", "kd", {}),
        *(Entry(f"kd-from-{name}", "kd", {}, (place,)) for place, name in enumerate(TEACHERS)),
        Entry("random", "random", {}),
        Entry("avg", "avg", {}),
        Entry("ka-ps", "ka-ps", {}),
        Entry("ka-lsr", "ka-lsr", {}),
        Entry("dtd-flsw", "dtd-flsw", {**KD, "dynamic_temperature": FLSW}),
        Entry("dtd-cwsm", "dtd-cwsm", {}),
        Entry("ka-dtd", "ka-dtd", {**KD, "dynamic_temperature": FLSW}),
        Entry("dtd-flsw-preset", "dtd-flsw", {}),
        Entry("ca-mkd", "ca-mkd", KD),
        Entry("ebkd", "ebkd", KD),
        Entry("ae-kd", "ae-kd", KD),
        Entry("kd-without-mistaken", "kd", {}, (0, 2)),
        Entry("adaptive", "amtml", {**KD, "terms": {"angle": None}}),
        Entry("adaptive-small", "amtml", {**KD, "terms": {"angle": None}, "fusion": {"init": 0.1}}),
        Entry("amtml", "amtml", KD),
        Entry("amtml-small", "amtml", {**KD, "fusion": {"init": 0.1}}),
        Entry("amtml-hints", "amtml-hints", {**KD, "terms": {"hint": {"weight": 0.01}}}),
        Entry("amtml-preset", "amtml", {}),
        Entry("amtml-gated", "amtml-gated", KD),
    ]
    return made if names is None else [entry for entry in made if entry.name in names]


def recipe(entry: Entry, stores: list[Path], seed: int, epochs: int, **fields: Any) -> TrainRecipe:
    chosen = [stores[place] for place in entry.teachers]
    view = view_recipe("digits")
    return TrainRecipe.model_validate(
        {
            "student": STUDENT, "method": entry.method,
            "objective": resolve_objective(entry.method, entry.objective, entry.name, classes=10),
            "stores": [str(store) for store in chosen], "source": "digits:train", "evaluation": "digits:test",
            "view": view, "limit": 300, "epochs": epochs, "seed": seed, "optimizer": {"lr": 0.1}, **fields,
        }
    )  # fmt: skip


class Changed(torch.nn.Module):
    """Teacher with modified logits."""

    def __init__(self, module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = module
        self.change = change

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits `(N, C)`."""
        return self.change(self.inner(images))


def knows(classes: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that reduces the differences between the logits of all but some classes."""
    unknown = torch.tensor([label not in classes for label in range(10)])

    def change(logits: torch.Tensor) -> torch.Tensor:
        blurred = logits[:, unknown].mean(1, keepdim=True)
        return torch.where(unknown, blurred + 0.1 * torch.sin(37 * logits), logits)

    return change


def noisy(logits: torch.Tensor) -> torch.Tensor:
    """Return logits with noise of the same magnitude, which is a deterministic function of the logits."""
    noise = torch.sin(1e3 * logits) + torch.cos(1e3 * logits.roll(1, 1))
    return logits + logits.std(1, keepdim=True) * 1.2 * noise


def mistaken(logits: torch.Tensor) -> torch.Tensor:
    """Return logits that call every 3 an 8 and every 8 a 3."""
    swapped = torch.arange(10, device=logits.device)
    swapped[3], swapped[8] = 8, 3
    return logits[:, swapped]


CHANGES: dict[str, list[Callable[[torch.Tensor], torch.Tensor] | None]] = {
    "plain": [None, None, None],
    "noisy": [None, None, noisy],
    "experts": [knows((0, 1, 2, 3)), knows((3, 4, 5, 6)), knows((7, 8, 9, 0))],
    "sure": [lambda logits: 8 * logits] * 3,
    "mistaken": [None, mistaken, None],
    "presets": [None, None, None],
}
NOTES = {
    "plain": "three good teachers",
    "noisy": "a good cnn, an mlp after one epoch (weak), and a resnet with noise on its logits",
    "experts": "teachers that each tell four classes apart",
    "sure": "teachers with logits times eight",
    "mistaken": "two good teachers, and a cnn that takes 3 for 8 and 8 for 3",
    "presets": "the three good teachers, every method with its own numbers, a convolutional student",
}
FIELDS: dict[str, dict[str, Any]] = {
    "presets": {"student": CONVOLUTIONAL, "optimizer": {"lr": LEARNING_RATE}}
}
"""Fields of the recipes of a setting that are others than usual."""
ROWS: dict[str, tuple[str, ...] | None] = {
    "plain": None,
    "noisy": ("plain", "kd", "random", "avg", "ka-ps", "ka-lsr", "ka-dtd", "ca-mkd", "ebkd", "ae-kd",
              "adaptive", "adaptive-small", "amtml", "amtml-gated"),
    "experts": ("plain", "kd", "ka-ps", "ca-mkd", "ebkd", "ae-kd", "adaptive", "adaptive-small", "amtml",
                "amtml-gated"),
    "sure": ("plain", "kd", "ka-ps", "dtd-flsw", "dtd-cwsm", "ka-dtd", "dtd-flsw-preset", "ca-mkd",
             "ae-kd", "amtml-gated"),
    "mistaken": ("plain", "kd", "kd-without-mistaken", "avg", "ka-ps", "ka-lsr", "ca-mkd", "ebkd", "ae-kd",
                 "adaptive", "adaptive-small", "amtml", "amtml-gated"),
    "presets": None,
}  # fmt: skip
QUICK_ROWS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "kd", "amtml-hints"), "noisy": ("kd",), "presets": ("kd", "at", "ft"),
}  # fmt: skip


def train_teachers(folder: Path, quick: bool) -> dict[str, list[Path]]:
    """Train the good teachers and the weak one, and return their run folders."""
    supervised = Entry("teacher", "supervised", {}, ())
    made = {}
    for name, epochs in (*((name, 1 if quick else 25) for name in TEACHERS), ("weak", 1)):
        network = "mlp" if name == "weak" else name
        plain = recipe(supervised, [], 0, epochs, student=f"digits-{network}", limit=64 if quick else None)
        changes = {"lr": 0.01} if name == "weak" else {"lr": 0.05}
        plain = TrainRecipe.model_validate({**plain.model_dump(), "optimizer": changes})
        train(plain, folder / name, device=CPU)
        made[name] = folder / name
    good = [made[name] for name in TEACHERS]
    return {
        "plain": good, "noisy": [made["weak"], *good[1:]], "experts": good, "sure": good,
        "mistaken": good, "presets": good,
    }  # fmt: skip


def write_stores(folder: Path, runs: list[Path], setting: str, views: int) -> tuple[list[Path], list[float]]:
    """Write the stores of a setting, and return them with the seconds that each teacher took."""
    source, stores, seconds = open_source("digits"), [], []
    tapped = TAPS if setting == "presets" else TEACHERS
    for run, taps, change in zip(runs, tapped.values(), CHANGES[setting], strict=True):
        network = load_teacher(f"run:{run}", source.class_names)
        if change is not None:
            network = replace(network, module=Changed(network.module, change))
            taps = ()
        runner = TeacherRunner(network, [parse_tap(tap) for tap in taps])
        stores.append(folder / setting / f"{run.name}.zarr")
        started = time.perf_counter()
        run_job(Job(stores[-1], source, view_recipe("digits"), runner, views), quiet=True)
        seconds.append(time.perf_counter() - started)
    return stores, seconds


def teacher_accuracy(store: Path) -> float:
    sums = [record["sums"] for record in StoreReader(store).manifest.view_records.values()]
    return sum(each["correct"] for each in sums) / sum(each["rows"] for each in sums)


def train_student(recipe: TrainRecipe, title: str) -> tuple[dict[str, float], Network]:
    """Train a student, and return its figures and itself; one that diverges is counted as untrained."""
    run = prepare(recipe, CPU)
    state, diverged = make_state(run), False
    started = time.perf_counter()
    try:
        for epoch in range(recipe.epochs):
            train_epoch([state], run.batches(epoch), run.targets, epoch)
    except TrainingDiverged:
        inform(f"{title}: seed {recipe.seed} diverged, counted as untrained")
        state, diverged = make_state(run), True
    seconds = time.perf_counter() - started
    values = evaluate(state.network, run.evaluation, CPU)
    values |= {"seconds": seconds, "diverged": float(diverged)}
    return {name: values[name] for name in FIGURES}, state.network


def study(
    setting: str, stores: list[Path], seeds: int, epochs: int, rows: list[Entry], limit: int
) -> tuple[Found, list[dict[str, Any]]]:
    """Return the figures of every row by seed, and a row for each method that refuses student or teachers."""
    told: Found = {}
    refused = []
    fields = {"views": len(StoreReader(stores[0]).views), "limit": limit, **FIELDS.get(setting, {})}
    for entry in rows:
        try:
            several = [
                train_student(recipe(entry, stores, seed, epochs, **fields), f"{setting} {entry.name}")[0]
                for seed in range(seeds)
            ]
        except RecipeError as error:
            why = str(error).replace(f"{stores[0].parent}/", "")
            inform(f"{setting} {entry.name}: refused: {why}")
            refused.append(exact(f"{setting}/{entry.name}, refused", 1, "refusal", {"why": why}))
            continue
        found = told[entry.name] = {name: [each[name] for each in several] for name in FIGURES}
        inform(f"{setting} {entry.name}: {np.mean(found['accuracy']):.2%}, {np.mean(found['seconds']):.2f} s")
    return told, refused


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 95 % confidence interval of a mean."""
    if len(differences) < 2 or np.ptp(differences) < NO_SPREAD:
        return float(differences.mean()), float(differences.mean())
    low, high = stats.t.interval(
        0.95, len(differences) - 1, differences.mean(), differences.std(ddof=1) / np.sqrt(len(differences))
    )
    return float(low), float(high)


def rows_of(setting: str, told: Found, note: str, against: str = "kd") -> list[dict[str, Any]]:
    """Print the table of a setting with differences from one row, and return its rows for the JSON file."""
    base, rows, cells = np.array(told[against]["accuracy"]), [], []
    for name, found in told.items():
        accuracy = 100 * np.array(found["accuracy"])
        difference = accuracy - 100 * base
        low, high = interval(difference)
        same = bool(np.ptp(difference) < NO_SPREAD)
        p = 1.0 if same or len(difference) < 2 else float(stats.ttest_rel(accuracy, 100 * base).pvalue)
        diverged = int(sum(found["diverged"]))
        deviation = f"{accuracy.std(ddof=1):.2f}" if len(accuracy) > 1 else "-"
        cells.append(
            [f"{name}, {diverged} diverged" if diverged else name, f"{accuracy.mean():.2f}", deviation,
             f"{difference.mean():+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p:.3f}",
             f"{np.mean(found['nll']):.3f}", f"{np.mean(found['calibration_error']):.3f}",
             f"{np.median(found['seconds']):.2f}"]
        )  # fmt: skip
        config = {"setting": setting, "interval": "95 %"}
        told_of = {
            "nll": float(np.mean(found["nll"])), "seconds": float(np.median(found["seconds"])),
            "calibration error": float(np.mean(found["calibration_error"])), "diverged": diverged,
        }  # fmt: skip
        figures = [("", accuracy.mean(), interval(accuracy), "%", told_of)]
        figures.append(
            (f" - {against}", difference.mean(), (low, high), "points", {"p": p, "below 0.05": p < 0.05})
        )
        rows += [
            {
                "id": f"{setting}/{name}{what}", "value": float(value), "low": ends[0], "high": ends[1],
                "unit": unit, "n": len(accuracy), "config": config | more, "bar": None, "holds": None,
            }
            for what, value, ends, unit, more in figures
        ]  # fmt: skip
    header = ["method", "accuracy", "sd", f"minus {against}", "95 % interval", "p", "nll", "ece", "s a run"]
    print_table(f"{setting}: {note}", header, cells)
    return rows


def saved(stores: list[Path], seconds: list[float], students: int, epochs: int) -> dict[str, Any]:
    """Return the seconds saved over live teachers: their time for these students, less that of the stores."""
    run = prepare(recipe(Entry("kd", "kd", {}), stores, 0, 1, online=True), CPU)
    assert run.targets is not None
    several = list(run.batches(0))
    for batch in several:
        batch.pixels(8)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        for batch in several:
            run.targets.fetch(batch)
        times.append(time.perf_counter() - started)
    epoch = float(np.median(times[1:]))
    value = (students * epochs * epoch - sum(seconds)) / 3600
    config = {"students": students, "epochs": epochs, "live_epoch_s": epoch, "stores_s": sum(seconds)}
    return row("teacher-hours-saved", [value], "h", config)


def settings(folder: Path, chosen: list[str], quick: bool) -> list[dict[str, Any]]:
    """Measure the rows of the chosen settings, and the hours of live teachers that the stores save."""
    seeds, epochs, views = (2, 1, 1) if quick else (10, 40, 8)
    rows: list[dict[str, Any]] = []
    runs = train_teachers(folder / "teachers", quick)
    students, spent, plain = 0, 0.0, []
    for setting, names in (QUICK_ROWS if quick else ROWS).items():
        if setting not in chosen:
            continue
        stores, seconds = write_stores(folder, runs[setting], setting, views)
        plain = plain or stores
        spent += sum(seconds)
        inform(f"{setting}: teachers right on {', '.join(f'{teacher_accuracy(s):.1%}' for s in stores)}")
        told, refused = study(setting, stores, seeds, epochs, entries(setting, names), 64 if quick else 300)
        students += seeds * (len(told) - 1)
        rows += [*rows_of(setting, told, NOTES[setting]), *refused]
    return [*rows, saved(plain, [spent], students, epochs)]


def main() -> None:
    parser = arguments("What each method does for a student of 300 digits, and what it costs.")
    parser.add_argument("--section", choices=("study", "cost"), default="study", help="what to measure")
    parser.add_argument(
        "--settings", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME",
        help=f"settings of the study; default: {' '.join(ROWS)}",
    )  # fmt: skip
    chosen = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        if chosen.section == "study":
            title = "Students of 300 digits, accuracy on the test digits (mean, 95 % interval)"
            rows = settings(Path(name), chosen.settings, chosen.quick)
        else:
            title = "Steps and views of every method"
            rows = costs(Path(name), QUICK if chosen.quick else FULL)
    report(title, rows, chosen.json)


if __name__ == "__main__":
    main()
