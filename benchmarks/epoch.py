"""Time of an epoch of one student: alone, from stores, and with live teachers.

    python benchmarks/epoch.py [--stores A.zarr B.zarr ...] [--limit N] [--json FILE] [--quick]

Without --stores, three teachers of digits and their stores are created in a temporary folder; their accuracy
does not affect the times. The one-time cost of the teachers, writing all stores, is measured too.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from _harness import alternate, arguments, report, row

from coursepack.allocator import keep_freed_memory
from coursepack.data import open_source, view_recipe
from coursepack.data.store import StoreReader
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.models import TeacherRunner, load_teacher
from coursepack.precompute import Job, run_job

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEACHERS = ("mlp", "cnn", "resnet")
STUDENT = "digits-small"


def make_stores(folder: Path, names: tuple[str, ...], views: int, limit: int | None) -> list[Path]:
    source = open_source("digits")
    stores = []
    for name in names:
        supervised = recipe("supervised", [], student=f"digits-{name}", epochs=1, limit=limit)
        train(supervised, folder / name, device=DEVICE)
        network = load_teacher(f"run:{folder / name}", source.class_names)
        runner = TeacherRunner(network, device=DEVICE)
        stores.append(folder / f"{name}.zarr")
        run_job(Job(stores[-1], source, view_recipe("digits"), runner, views))
    return stores


def recipe(
    method: str, stores: list[Path], *, student: str = STUDENT, epochs: int = 40, **fields: object
) -> TrainRecipe:
    view = view_recipe("digits") if not stores else StoreReader(stores[0]).manifest.identity["view"]["recipe"]
    return TrainRecipe.model_validate(
        {
            "student": student, "method": method, "objective": resolve_objective(method, {}, "benchmark"),
            "stores": [str(store) for store in stores], "source": "digits:train",
            "evaluation": "digits:test", "view": view, "epochs": epochs, **fields,
        }
    )  # fmt: skip


def measure(stores: list[Path], limit: int | None, rounds: int) -> list[dict[str, object]]:
    runs = {
        "plain epoch": prepare(recipe("supervised", [], limit=limit), DEVICE),
        "epoch from stores": prepare(recipe("kd", stores, limit=limit), DEVICE),
        "epoch with live teachers": prepare(recipe("kd", stores, limit=limit, online=True), DEVICE),
    }
    states = {name: make_state(run) for name, run in runs.items()}
    epochs = dict.fromkeys(runs, 0)

    def one_epoch(name: str) -> None:
        views = len(StoreReader(stores[0]).views) if name == "plain epoch" else None
        epoch = epochs[name] % views if views else epochs[name]
        train_epoch([states[name]], runs[name].batches(epoch), runs[name].targets)
        epochs[name] += 1
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    seconds = alternate({name: lambda name=name: one_epoch(name) for name in runs}, rounds)
    config = {"student": STUDENT, "teachers": [store.stem for store in stores], "limit": limit, "batch": 64}
    rows = [row(name, [1000 * s for s in values], "ms", config) for name, values in seconds.items()]
    for name in ("epoch from stores", "epoch with live teachers"):
        pairs = zip(seconds[name], seconds["plain epoch"], strict=True)
        rows.append(row(f"{name} / plain", [a / b for a, b in pairs], "ratio", config))
    return [*rows, teacher_cost(stores, config)]


def teacher_cost(stores: list[Path], config: dict[str, object]) -> dict[str, object]:
    """Measure the seconds to write all stores again, the total cost of the teachers."""
    spent = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for path in stores:
            manifest = StoreReader(path).manifest
            source = open_source(manifest.identity["source"]["name"])
            network = load_teacher(
                manifest.identity["teacher"]["network"],
                source.class_names,
                weights=manifest.origin["weights_file"],
            )
            view = view_recipe("digits")
            job = Job(
                Path(folder) / path.name, source, view, TeacherRunner(network, device=DEVICE), manifest.views
            )
            started = time.perf_counter()
            run_job(job, quiet=True)
            spent += time.perf_counter() - started
    return row("teachers, once, all views", [1000 * spent], "ms", config)


def main() -> None:
    parser = arguments("An epoch alone, from stores, and with live teachers.")
    parser.add_argument("--stores", type=Path, nargs="+", help="stores of digit teachers")
    parser.add_argument("--limit", type=int, help="train on this many samples")
    chosen = parser.parse_args()
    keep_freed_memory()
    rounds = 1 if chosen.quick else 40
    with tempfile.TemporaryDirectory() as folder:
        size = (TEACHERS[:2], 1, 64) if chosen.quick else (TEACHERS, 8, None)
        stores = chosen.stores or make_stores(Path(folder), *size)
        rows = measure(stores, chosen.limit or (64 if chosen.quick else None), rounds)
    report("One epoch of a digit student", rows, chosen.json)


if __name__ == "__main__":
    main()
