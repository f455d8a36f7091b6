"""Loss of encodings of logits, beside rows of other projects, and students trained from each.

    python benchmarks/fidelity.py [--no-students] [--json FILE] [--quick]

The loss is KL(float32 || decoded) in nats, the mean over all rows, at several temperatures. Rows of other
projects are written and read as their training code does, with as many bytes. Made-up logits are low-rank
with a heavy tail, which sparse rows do worst at; the digits are a trained CNN's. Students are trained by `kd`
from stores of one teacher in each form, with the same seeds; what they lose is against float32. Other
projects' rows are stored as the float32 logits that they decode to.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _content import logits, made_labels
from _harness import arguments, exact, report
from _peers import digit_logits, renormalized_rows, top_probs_rows
from methods import KD, Changed, Entry, interval, recipe, train_student
from scipy import stats

from coursepack.console import inform
from coursepack.data import open_source, view_recipe
from coursepack.data.encodings import parse_encoding, row_bytes, smaller_encoding
from coursepack.distill.runs.train import train
from coursepack.kernels import soft_target_loss
from coursepack.models import TeacherRunner, load_teacher
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from _harness import Row

    from coursepack.kernels import Rows

CPU = torch.device("cpu")
TEMPERATURES = (1.0, 2.0, 4.0, 10.0)
JUDGED = (1.0, 4.0)
"""Temperatures with a bar."""
BYTES, DIGIT_BYTES = (32, 48, 104, 208), (12, 16)


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    rows: int = 2048
    wide_rows: int = 256
    digit_epochs: int = 8
    seeds: int = 10
    epochs: int = 40
    teacher_epochs: int = 25
    limit: int = 300
    views: int = 8


FULL = Size()
QUICK = Size(rows=64, wide_rows=8, digit_epochs=1, seeds=2, epochs=1, teacher_epochs=1, limit=64, views=1)
MADE = {
    "C=100": (100, 1.5),
    "C=1000 flat": (1000, 0.8),
    "C=1000 peaked": (1000, 3.0),
    "C=21841": (21841, 2.0),
}
"""Number of classes and scale of made-up logits."""


def errors(values: torch.Tensor, rows: Rows) -> dict[float, float]:
    """Return the mean KL(exact || decoded) in nats by temperature."""
    found = {}
    for temperature in TEMPERATURES:
        decoded = rows.decode(torch.full((len(values),), temperature))
        scaled = soft_target_loss(decoded, [values], temperature=temperature)
        found[temperature] = float(scaled.double().mean()) / temperature**2
    return found


def encoded(values: np.ndarray, labels: np.ndarray, name: str) -> tuple[Rows, str, int]:
    """Return the rows of an encoding, or of the dense one stored in its place, with name and bytes."""
    encoding = smaller_encoding(parse_encoding(name), values.shape[1:])
    parts = encoding.encode(values, np.arange(len(values)), labels)
    tensors = {key: torch.from_numpy(part) for key, part in parts.items()}
    return encoding.rows(tensors, values.shape[1:]), encoding.name, row_bytes(encoding, values.shape[1:])


def largest(name: str, classes: int, size: int) -> str | None:
    """Return the sparse encoding with the most entries that fits a size, if any has two."""
    most = min(classes, 2 * size)
    fits = [k for k in range(2, most + 1) if row_bytes(parse_encoding(f"{name}:{k}"), (classes,)) <= size]
    return f"{name}:{fits[-1]}" if fits else None


def kl_rows(title: str, size: int, found: dict[float, float]) -> list[Row]:
    return [
        exact(f"KL {title} T={temperature:g}", value, "nats", {"bytes a view": size})
        for temperature, value in found.items()
    ]


def dense(values: np.ndarray, what: str, labels: np.ndarray) -> list[Row]:
    """Measure the dense encodings."""
    made, rows = torch.from_numpy(values), []
    for name in ("float16", "bfloat16", "int8", "int4"):
        decoded, _, size = encoded(values, labels, name)
        rows += kl_rows(f"{what}, {name} ({size} B)", size, errors(made, decoded))
    return rows


def sparse(values: np.ndarray, what: str, labels: np.ndarray, size: int) -> list[Row]:
    """Measure sparse encodings of a size, and how much farther other projects' rows are."""
    made, classes = torch.from_numpy(values), values.shape[1]
    title, rows = f"{what}, {size} B", []
    ours, theirs = [], []
    for name in filter(None, (largest(each, classes, size) for each in ("topk", "topk16"))):
        decoded, stored, own = encoded(values, labels, name)
        if own <= size:
            ours.append(errors(made, decoded))
            rows += kl_rows(f"{title}: {stored}", own, ours[-1])
    with_seed, entries = (min(size // 4 - seed, classes - 1) for seed in (1, 0))
    for name, decoded in (
        (f"TinyViT, top-{with_seed} with its seed", top_probs_rows(values, with_seed)[0]),
        (f"TinyViT, top-{entries}", top_probs_rows(values, entries)[0]),
        (f"FKD, top-{entries} renormalized", renormalized_rows(values, entries)),
    ):
        theirs.append(errors(made, decoded))
        rows += kl_rows(f"{title}: {name}", size, theirs[-1])
    for t in TEMPERATURES:
        ratio = min(found[t] for found in theirs) / ours[0][t]
        bar = ">= 1.0" if t in JUDGED else None
        rows.append(exact(f"nearest of others / ours: {title} T={t:g}", ratio, "ratio", {}, bar))
    return rows


def fidelities(values: np.ndarray, what: str, labels: np.ndarray, sizes: tuple[int, ...]) -> list[Row]:
    """Measure dense encodings, and sparse ones of several sizes beside other projects' rows."""
    beside = row_bytes(parse_encoding("int4"), values.shape[1:])
    if min(sizes) < beside:
        sizes = (*sizes, beside)
    rows = dense(values, what, labels)
    for size in sorted(sizes):
        rows += sparse(values, what, labels, size)
    return rows


def read_back(
    form: Callable[[np.ndarray, int], Rows], entries: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from logits to what another project's rows decode to."""
    return lambda values: form(values.numpy(), entries).decode()


def students(folder: Path, size: Size) -> list[Row]:
    """Train students from stores of one CNN in each form, and compare their accuracies with float32's."""
    teacher = folder / "cnn"
    supervised = Entry("teacher", "supervised", {}, ())
    fields = {"student": "digits-cnn", "optimizer": {"lr": 0.05}, "limit": None}
    train(recipe(supervised, [], 0, size.teacher_epochs, **fields), teacher, device=CPU)
    network = load_teacher(f"run:{teacher}", open_source("digits").class_names)
    forms: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor] | None]] = {
        name: (name, None) for name in ("float32", "int8", "int4", "topk:3", "topk:2", "topk16:2")
    }
    for entries in (3, 4):
        forms[f"TinyViT, top-{entries}"] = "float32", read_back(lambda v, k: top_probs_rows(v, k)[0], entries)
        forms[f"FKD, top-{entries} renormalized"] = "float32", read_back(renormalized_rows, entries)
    stores = {}
    for title, (encoding, change) in forms.items():
        module = network.module if change is None else Changed(network.module, change)
        stores[title] = folder / f"{len(stores)}.zarr"
        runner = TeacherRunner(replace(network, module=module))
        job = Job(
            stores[title], open_source("digits"), view_recipe("digits"), runner, size.views, encoding=encoding
        )
        run_job(job, quiet=True)
    rows = []
    for temperature in JUDGED:
        reference: np.ndarray | None = None
        entry = Entry("kd", "kd", {**KD, "temperature": temperature})
        entry = replace(entry, teachers=(0,))
        for title, store in stores.items():
            found = []
            for seed in range(size.seeds):
                own = recipe(entry, [store], seed, size.epochs, views=size.views, limit=size.limit)
                found.append(100 * train_student(own, title)[0]["accuracy"])
            accuracies = np.array(found)
            reference = accuracies if reference is None else reference
            rows += student_rows(f"student from {title} T={temperature:g}", accuracies, reference)
            inform(f"T={temperature:g} {title}: {accuracies.mean():.2f} %")
    return rows


def student_rows(title: str, accuracies: np.ndarray, reference: np.ndarray) -> list[Row]:
    """Return the mean accuracy, and its difference from the reference of the same seeds."""
    rows = []
    both = ((title, accuracies), (f"{title} - float32", accuracies - reference))
    for name, values in both[: 1 if accuracies is reference else 2]:
        low, high = interval(values)
        config: dict[str, Any] = {"interval": "95 %"}
        if values is not accuracies and np.ptp(values) > 0:
            config["p"] = float(stats.ttest_1samp(values, 0).pvalue)
        unit = "%" if values is accuracies else "points"
        rows.append(
            exact(name, float(values.mean()), unit, config) | {"low": low, "high": high, "n": len(values)}
        )
    return rows


def main() -> None:
    parser = arguments("What encodings of logits lose, and students trained from each.")
    parser.add_argument("--no-students", action="store_true", help="train no students")
    chosen = parser.parse_args()
    size = QUICK if chosen.quick else FULL
    rows: list[Row] = []
    for what, (classes, scale) in MADE.items():
        count = size.wide_rows if classes > 10_000 else size.rows
        values = logits(count, classes, scale=scale)
        rows += fidelities(values, what, made_labels(count, classes), BYTES)
    values, what, labels = digit_logits(size.digit_epochs)
    rows += fidelities(values, what, labels, DIGIT_BYTES)
    if not chosen.no_students:
        with tempfile.TemporaryDirectory() as folder:
            rows += students(Path(folder), size)
    report("Encodings", rows, chosen.json)


if __name__ == "__main__":
    main()
