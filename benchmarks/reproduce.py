"""Published accuracies of distilled students on CIFAR-100, beside ours from the original files.

    python benchmarks/reproduce.py --root DIR [--pairs ...] [--methods ...] [--seeds 3] [--out DIR] [--quick]

DIR holds `cifar-100-python`. Every teacher is trained once, or taken from `--weights`; its stores are written
with the taps that the chosen methods read; every student is trained with each seed. All settings are those of
recipes/cifar100, with layers of the same depth for other networks. What is finished under `--out` is skipped,
and what was interrupted is continued. `--quick` runs all of it on a few made-up images, whose accuracies mean
nothing. Ours is the accuracy on the test images after the last epoch, with the 95 % interval over seeds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _harness import Row, arguments, machine, write_rows
from methods import interval

from coursepack.console import inform, print_table, printable
from coursepack.data import open_source, view_recipe
from coursepack.device import pick_device
from coursepack.distill.recipe import load_recipe, set_values
from coursepack.distill.runs.train import train
from coursepack.distill.setup.resolve import resolve_recipe
from coursepack.distill.training.evaluate import evaluate
from coursepack.errors import CoursepackError, RecipeError, TrainingDiverged
from coursepack.models import Network, TeacherRunner, load_teacher, parse_tap
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "cifar100"

PAIRS = (
    "wrn-40-2/wrn-16-2", "wrn-40-2/wrn-40-1", "resnet56/resnet20", "resnet110/resnet20",
    "resnet110/resnet32", "resnet32x4/resnet8x4", "vgg13/vgg8",
)  # fmt: skip
"""Teachers and students of RepDistiller (Tian et al. 2020) with networks of one family."""
TEACHERS = {"wrn-40-2": 75.61, "resnet56": 72.34, "resnet110": 74.31, "resnet32x4": 79.42, "vgg13": 74.64}
"""Published accuracies of the teachers in %."""
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "supervised": (73.26, 71.98, 69.06, 69.06, 71.14, 72.50, 70.36),
    "kd": (74.92, 73.54, 70.66, 70.67, 73.08, 73.33, 72.98),
    "fitnets": (73.58, 72.24, 69.21, 68.99, 71.06, 73.50, 71.02),
    "at": (74.08, 72.77, 70.55, 70.22, 72.31, 73.44, 71.43),
    "sp": (73.83, 72.43, 69.67, 70.04, 72.69, 72.94, 72.68),
    "vid": (74.11, 73.30, 70.38, 70.16, 72.61, 73.09, 71.23),
    "rkd": (73.35, 72.22, 69.61, 69.25, 71.82, 71.90, 71.48),
    "pkt": (74.54, 73.45, 70.34, 70.25, 72.61, 73.64, 72.88),
    "ab": (72.50, 72.38, None, None, None, None, None),  # taps before the ReLU: wide residual networks only
    "fsp": (72.91, None, 69.95, 70.11, 71.89, 72.62, 70.23),
    "nst": (73.68, 72.24, 69.60, 69.53, 71.96, 73.30, 71.53),
    "crd": (75.48, 74.14, 71.16, 71.46, 73.48, 75.51, 73.94),
    "dkd": (76.23, 74.81, 71.97, None, 74.11, 76.32, 74.68),
    "logit-std": (76.11, 74.37, 71.43, None, 74.17, 76.62, 74.36),
    "dist": (None, 74.43, 71.75, None, None, 76.31, None),
}
"""Accuracy on the test images in %, in the order of `PAIRS`; None if it or its setting is not known."""
REPDISTILLER = "RepDistiller's README"
SOURCES = {"dkd": "mdistiller's README", "logit-std": "README of its release", "dist": "its README"}
"""Where the figures of methods stand that are not RepDistiller's."""
CHANGES = {
    ("dkd", "wrn-16-2"): "objective.terms.dkd.beta=6", ("dkd", "wrn-40-1"): "objective.terms.dkd.beta=6",
    ("dkd", "resnet20"): "objective.terms.dkd.beta=2", ("dkd", "resnet32"): "objective.terms.dkd.beta=2",
    ("dkd", "vgg8"): "objective.terms.dkd.beta=6", ("logit-std", "vgg8"): "objective.temperature=3",
}  # fmt: skip
"""What the releases set for a student, as the recipes' comments have it."""
WIDE = "embeddings of wide residual networks are taken before the last normalization and ReLU"
DIFFERENCES = {
    "fsp": "flows are learned throughout, in the release for 30 epochs before the labels",
    "nst": "compares the last block only, in the release every block",
    **dict.fromkeys(("rkd", "pkt", "crd"), WIDE),
}
"""What differs from the releases besides the number of views."""
RESIDUAL, VGG = ("stem", "layer1", "layer2", "layer3"), ("layer1", "layer2", "layer3", "layer4", "layer5")
"""Blocks of the networks; the recipes name those of residual ones."""

QUICK_PAIRS, QUICK_METHODS, QUICK_VIEWS = PAIRS[2:3], ("kd", "at"), 2
QUICK = ("epochs=2", "batch_size=10", "optimizer.schedule.milestones=[1]", "optimizer.lr=0.001")
QUICK_PHASES = {
    "ab": ("objective.hard_weight.epochs=1", "objective.terms.ab.weight.epochs=1"),
    "ft": ("objective.terms.ft.paraphraser_epochs=1",),
}


@dataclass(frozen=True)
class Place:
    """Folders of the data and of the results, device, and whether the run is a quick one."""

    root: Path
    out: Path
    device: torch.device
    quick: bool


@dataclass(frozen=True)
class Experiment:
    """One method for one pair, with the values of its recipe."""

    pair: str
    method: str
    file: Path
    values: dict[str, Any]
    views: int
    encoding: str

    @property
    def teacher(self) -> str:
        return self.pair.split("/")[0]

    @property
    def store(self) -> str | None:
        """Name of the store; methods with the same teacher, views and encoding share it."""
        return f"{self.teacher}-{self.views}-{self.encoding}.zarr" if self.views else None

    @property
    def taps(self) -> list[str]:
        terms = self.values.get("objective", {}).get("terms", {}).values()
        return [pair["tap"] for term in terms for pair in term.get("pairs", ())]


def experiment(pair: str, method: str, quick: bool) -> Experiment:
    """Return a method's recipe with another pair's networks, layers and settings."""
    teacher, student = pair.split("/")
    file = RECIPES / ("kd-resnet8x4.yaml" if method == "kd" else f"{method}.yaml")
    values = load_recipe(file) | {"student": student}
    for term in values.get("objective", {}).get("terms", {}).values():
        if "pairs" in term:
            term["pairs"] = translated(term["pairs"], VGG if teacher.startswith("vgg") else RESIDUAL)
    changes = [CHANGES[method, student]] if (method, student) in CHANGES else []
    set_values(values, [*changes, *((*QUICK, *QUICK_PHASES.get(method, ())) if quick else ())])
    # The number of views and the encoding are options of the command that the recipe's comment has.
    options = dict(re.findall(r"--(views|feature-encoding) (\w+)", file.read_text()))
    views = min(int(options.get("views", 0)), QUICK_VIEWS if quick else sys.maxsize)
    return Experiment(pair, method, file, values, views, options.get("feature-encoding", "float16"))


def translated(pairs: Sequence[dict[str, Any]], blocks: Sequence[str]) -> list[dict[str, Any]]:
    """Return a recipe's pairs with blocks of the same depth: neighbors, all but the first, or one."""
    named = [pair["layer"] for pair in pairs]
    if not {part for name in named for part in name.split("+")} <= set(RESIDUAL):
        return list(pairs)  # layers inside blocks are those of the recipe's own family
    layers = list(blocks[1:])
    if "+" in named[0]:
        layers = ["+".join(two) for two in itertools.pairwise(blocks)]
    elif len(named) == 1:
        layers = [blocks[-1] if named[0] == RESIDUAL[-1] else blocks[RESIDUAL.index(named[0])]]
    _, colon, reduction = pairs[0]["tap"].partition(":")
    return [{"teacher": 0, "tap": f"{layer}{colon}{reduction}", "layer": layer} for layer in layers]


def train_network(values: dict[str, Any], file: Path, folder: Path, place: Place) -> float:
    """Train a network into a folder unless it is finished there, and return its accuracy in %."""
    recipe = resolve_recipe(values | {"root": str(place.root)}, str(file))
    metrics = train(recipe, folder, device=place.device, resume=True)
    return 100 * float(metrics["evaluation"]["accuracy"])


def make_teacher(name: str, weights: str | None, place: Place) -> tuple[Network, float]:
    """Return a trained teacher and its accuracy in %."""
    values = experiment(f"{name}/{name}", "supervised", place.quick).values
    source = open_source(values["evaluation"], place.root)
    if weights is None:
        folder = place.out / "teachers" / name
        accuracy = train_network(values, RECIPES / "supervised.yaml", folder, place)
        return load_teacher(f"run:{folder}", source.class_names), accuracy
    network = load_teacher(name, source.class_names, weights=weights)
    network.module.to(place.device)
    return network, 100 * evaluate(network, source, place.device)["accuracy"]


def write_stores(experiments: Sequence[Experiment], teachers: dict[str, Network], place: Place) -> None:
    """Write what is missing of the stores, each with the taps of all methods that read it."""
    for name in dict.fromkeys(each.store for each in experiments if each.store):
        readers = [each for each in experiments if each.store == name]
        first, taps = readers[0], dict.fromkeys(tap for each in readers for tap in each.taps)
        source, view = open_source(first.values["source"], place.root), view_recipe(first.values["view"])
        runner = TeacherRunner(teachers[first.teacher], list(map(parse_tap, taps)), place.device)
        path, encoding = place.out / "stores" / name, first.encoding
        run_job(Job(path, source, view, runner, first.views, feature_encoding=encoding, root=place.root))


def row(name: str, accuracies: list[float], published: float | None, config: dict[str, Any]) -> Row:
    (low, high), count = interval(np.array(accuracies)), len(accuracies)
    config |= {"published": published, "interval": "95 %" if count > 1 else "one run", "runs": accuracies}
    return {
        "id": name, "value": float(np.mean(accuracies)), "low": low, "high": high, "unit": "%", "n": count,
        "config": config, "bar": None, "holds": None,
    }  # fmt: skip


def student_row(each: Experiment, seeds: int, place: Place) -> Row | None:
    """Train a method's students, and return their row; None if the training of all diverged."""
    name, student = f"{each.pair}/{each.method}", each.pair.split("/")[1]
    stores = {"stores": [str(place.out / "stores" / each.store)]} if each.store else {}
    # A student alone is the same for all teachers.
    folder = place.out / "students" / (name if each.store else student)
    accuracies, diverged = [], []
    for seed in range(seeds):
        values = {**each.values, **stores, "seed": seed}
        try:
            accuracies.append(train_network(values, each.file, folder / str(seed), place))
        except TrainingDiverged as error:
            inform(f"{name}, seed {seed}: {error}")
            diverged.append(seed)
    config = {
        "source": SOURCES.get(each.method, REPDISTILLER), "recipe": each.file.relative_to(ROOT).as_posix(),
        "change": CHANGES.get((each.method, student)), "views": each.views,
        "epochs": each.values["epochs"], "differs": DIFFERENCES.get(each.method), "diverged": diverged,
        "quick": place.quick,
    }  # fmt: skip
    published = PUBLISHED[each.method][PAIRS.index(each.pair)]
    return row(name, accuracies, published, config) if accuracies else None


def reproduce(
    pairs: Sequence[str], methods: Sequence[str], seeds: int, weights: dict[str, str], place: Place
) -> list[Row]:
    """Train what is not finished, and return a row for every teacher, and for every method and pair."""
    known = [(pair, name) for pair in pairs for name in methods if PUBLISHED[name][PAIRS.index(pair)]]
    if not known:
        raise RecipeError(
            f"no published figure of {', '.join(methods)} for {', '.join(pairs)}: choose others"
        )
    chosen = [experiment(*each, place.quick) for each in known]
    rows, teachers = [], {}
    for name in dict.fromkeys(pair.split("/")[0] for pair in pairs):
        teachers[name], accuracy = make_teacher(name, weights.get(name), place)
        config = {"source": REPDISTILLER, "weights": weights.get(name), "quick": place.quick}
        rows.append(row(name, [accuracy], TEACHERS[name], config))
    write_stores(chosen, teachers, place)
    return rows + [made for each in chosen if (made := student_row(each, seeds, place)) is not None]


def print_rows(rows: Sequence[Row], quick: bool) -> None:
    cells = []
    for each in rows:
        config, spread = each["config"], f"{each['low']:.2f} to {each['high']:.2f}" if each["n"] > 1 else "-"
        figures = [f"{config['published']:.2f}", f"{each['value']:.2f}", spread, str(each["n"])]
        cells.append([each["id"], *figures, config["source"]])
    header = ["teacher/student/method", "published", "ours", "95 % interval", "n", "source of published"]
    images = "a few made-up images, which says nothing" if quick else "the test images of CIFAR-100"
    print_table(f"Accuracy in % on {images}", header, cells)


def teacher_file(word: str) -> tuple[str, str]:
    """Parse TEACHER=FILE."""
    name, _, file = word.partition("=")
    if name not in TEACHERS or not file:
        raise argparse.ArgumentTypeError(f"{word!r} is not TEACHER=FILE, TEACHER of {', '.join(TEACHERS)}")
    return name, file


def run(told: argparse.Namespace, scratch: Path) -> list[Row]:
    out = (told.out or (scratch if told.quick else Path("runs/reproduce"))).absolute()
    root = out / "data" if told.quick else told.root
    if told.quick and not root.exists():
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("image_files").write_cifar(root, 100)
    open_source("cifar100:train", root)  # refuses missing files before anything is written
    place = Place(root.absolute(), out, pick_device(told.device), told.quick)
    pairs = told.pairs or (QUICK_PAIRS if told.quick else PAIRS)
    methods = told.methods or (QUICK_METHODS if told.quick else tuple(PUBLISHED))
    return reproduce(pairs, methods, told.seeds, dict(told.weights or ()), place)


def main() -> None:
    parser = arguments("Published accuracies of distilled students on CIFAR-100, beside ours.")
    option = parser.add_argument
    option("--root", type=Path, help="folder that holds cifar-100-python")
    option("--pairs", nargs="+", choices=PAIRS, metavar="PAIR", help=f"default: {' '.join(PAIRS)}")
    option("--methods", nargs="+", choices=PUBLISHED, metavar="NAME", help=f"default: {' '.join(PUBLISHED)}")
    option("--seeds", type=int, choices=range(1, 101), metavar="N", default=3, help="default: 3")
    option("--device", default="auto", help="cpu, cuda, cuda:NUMBER or auto; default: auto")
    option("--weights", nargs="+", type=teacher_file, metavar="TEACHER=FILE", help="trained teachers")
    option("--out", type=Path, help="folder of runs and stores; default: runs/reproduce")
    told = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rows = run(told, Path(scratch))
    except (CoursepackError, OSError) as error:
        sys.exit(printable(f"error: {error}"))
    print_rows(rows, told.quick)
    if told.json is not None:
        write_rows(told.json, machine(), rows)
        inform(f"Wrote {told.json}.")


if __name__ == "__main__":
    main()
