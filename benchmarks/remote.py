"""Training from a bucket beside training from the local copy of the same store.

    python benchmarks/remote.py [--json FILE] [--quick]

An S3 server (moto) runs in a process of its own and sends 20 MB/s to all requests together. The cache holds
two views, so every epoch downloads the next view while it trains, and removes one. An epoch's wait is the
time that its steps wait for targets, minus that of the local store. CPU seconds are those of this process
while it opens a view that is not cached, minus those of opening it in the local store. Both are given as
shares of an epoch. Needs the extras `s3` and `s3-server`. A full run takes about two minutes.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from _bucket import Bucket, serving
from _harness import PATIENCE, arguments, exact, measure, ratios, report, row
from _train_growth import DEVICE, STUDENT, recipe, write_store

from coursepack.data import open_source
from coursepack.data.sources.cache import VARIABLE
from coursepack.data.store import StoreReader
from coursepack.data.store.cache import FEWEST_VIEWS, LIMIT_VARIABLE, SUFFIX, open_caches
from coursepack.data.store.locations import open_location
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.shards import rows_size
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from _harness import Row, Seconds

ENCODING = "int8"
VIEW = "cifar"


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    samples: int
    classes: int
    views: int
    rounds: int
    bytes_per_second: float = 20e6
    patience: float = PATIENCE


FULL, QUICK = Size(8192, 1000, 4, 8), Size(64, 10, 3, 1, patience=0)


class Measured:
    """Figures of each round beside its seconds, by name; the first round is a warm-up."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def note(self, name: str, value: float) -> None:
        self._values[name].append(value)

    def __getitem__(self, name: str) -> list[float]:
        return self._values[name][1:]

    def excess(self, name: str) -> list[float]:
        """Return the figures of the bucket minus those of the local store."""
        return [a - b for a, b in zip(self[f"{name}, bucket"], self[f"{name}, local"], strict=True)]


def epochs(
    where: str, store: str, spec: str, measured: Measured, after: Callable[[], None]
) -> Callable[[], float]:
    """Return a function that trains one more epoch and returns its seconds."""
    chosen = recipe(spec, VIEW, [store], STUDENT).model_copy(update={"reading": "mapped"})
    run = prepare(chosen, DEVICE)
    state, numbers = make_state(run), itertools.count()
    targets: Any = run.targets
    fetch = targets.fetch

    def one() -> float:
        waited = 0.0

        def timed(*what: Any) -> Any:
            nonlocal waited
            begun = time.perf_counter()
            found = fetch(*what)
            waited += time.perf_counter() - begun
            return found

        epoch, started = next(numbers), time.perf_counter()
        with mock.patch.object(targets, "fetch", timed):
            train_epoch([state], run.batches(epoch), targets, epoch)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        measured.note(f"waited, {where}", waited)
        after()
        return seconds

    return one


def opening(where: str, store: str, measured: Measured, bucket: Bucket) -> float:
    """Return the seconds to open the first view with an empty cache, and note the CPU seconds."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {VARIABLE: folder}):
        plain = StoreReader(store)
        [cache] = open_caches([(plain.location, plain.manifest)], [[LOGITS]])
        reader = StoreReader(store, "mapped", cache)
        bucket.requests()
        started, cpu = time.perf_counter(), time.process_time()
        reader.open(LOGITS, 0)
        seconds = time.perf_counter() - started
        measured.note(f"CPU, {where}", time.process_time() - cpu)
        measured.note(f"requests, {where}", bucket.requests())
    return seconds


def upload(store: Path, address: str) -> None:
    """Copy a store to an address."""
    location = open_location(address)
    for path in store.rglob("*"):
        if path.is_file():
            location.put(path.relative_to(store).as_posix(), path.read_bytes())


def training(folder: Path, bucket: Bucket, size: Size) -> list[Row]:
    """Measure epochs and the opening of a view, from the bucket and from the local store."""
    spec = f"fake,classes={size.classes},size=32,channels=3,samples={size.samples}"
    local, address = folder / "local.zarr", f"s3://{bucket.NAME}/remote.zarr"
    write_store(local, open_source(spec), VIEW, size.views, 0, ENCODING)
    upload(local, address)
    layouts = StoreReader(local).manifest.arrays[LOGITS].components.values()
    view_bytes = sum(rows_size(size.samples, layout) for layout in layouts)
    limit = FEWEST_VIEWS * view_bytes
    os.environ |= {VARIABLE: str(folder / "cache"), LIMIT_VARIABLE: str(limit)}
    measured = Measured()

    def after_epoch() -> None:
        measured.note("requests of an epoch", bucket.requests())
        files = (folder / "cache").rglob(f"*{SUFFIX}")
        measured.note("cache", sum(path.stat().st_size for path in files))

    from_bucket = epochs("bucket", address, spec, measured, after_epoch)

    def bucket_epoch() -> float:
        bucket.requests()
        return from_bucket()

    variants: dict[str, Callable[[], Any]] = {
        "epoch, local": epochs("local", str(local), spec, measured, lambda: None),
        "epoch, bucket": bucket_epoch,
        "view, local": lambda: opening("local", str(local), measured, bucket),
        "view, bucket": lambda: opening("bucket", address, measured, bucket),
    }
    config = {
        "samples": size.samples, "classes": size.classes, "encoding": ENCODING, "student": STUDENT,
        "views": size.views, "view bytes": view_bytes, "bytes per second": size.bytes_per_second,
        "cached views": FEWEST_VIEWS,
    }  # fmt: skip

    def rows_of(seconds: Seconds) -> list[Row]:
        epoch = statistics.median(seconds["epoch, local"])
        waited, cpu, first = measured.excess("waited"), measured.excess("CPU"), seconds["view, bucket"]
        beside = ratios(seconds, "epoch, bucket", "epoch, local")
        over = [one * size.bytes_per_second / view_bytes for one in first]
        largest = max(measured["cache"]) / limit
        return [
            row("epoch from the local store", seconds["epoch, local"], "s", config),
            row("epoch from the bucket", seconds["epoch, bucket"], "s", config),
            row("epoch from the bucket / local", beside, "ratio", config),
            row("seconds waited / epoch", [one / epoch for one in waited], "ratio", config, "<= 0.02"),
            row("CPU seconds added / epoch", [one / epoch for one in cpu], "ratio", config, "<= 0.02"),
            row("CPU time added by a view", [1000 * one for one in cpu], "ms", config),
            row("first view: wait", first, "s", config),
            row("first view: wait / (bytes / bandwidth)", over, "ratio", config, "<= 1.2"),
            row("requests of the first view", measured["requests, bucket"], "requests", config),
            row("requests of an epoch", measured["requests of an epoch"], "requests", config),
            exact("largest size of the cache / limit", largest, "ratio", config, "<= 1.0"),
        ]

    return measure(variants, size.rounds, rows_of, patience=size.patience)


def main() -> None:
    chosen = arguments("Training from a bucket beside training from a local store.").parse_args()
    size = QUICK if chosen.quick else FULL
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(size.bytes_per_second) as bucket,
        mock.patch.dict(os.environ, bucket.environment),
    ):
        rows = training(Path(folder), bucket, size)
    report("Training from a bucket", rows, chosen.json)


if __name__ == "__main__":
    main()
