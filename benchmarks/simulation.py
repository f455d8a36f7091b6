"""Stores at the size of ImageNet-21k x 300 views x 4 teachers: manifest, done-objects and start-up.

    python benchmarks/simulation.py [--json FILE] [--quick]

Manifest, lists and done-objects are real: the store's own code plans, writes and commits them. The first and
the last views are committed from done-objects, those between them straight to the manifest. The data files
are not written. Where something looks at them, they are sparse files of the right size; those of the first
view have the checksums of zeros and real indices. Nothing is flushed to the disk while the stores are made.
The source is `fake`, which needs no scan, so start-up leaves out the opening of image files. Seconds are CPU
seconds of the process.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import psutil
import torch
from _harness import arguments, exact, report, row

from coursepack.canonical import canonical_json
from coursepack.data import PRESETS, open_source, view_fingerprint
from coursepack.data.drift import MadeViews, probe_samples
from coursepack.data.encodings import parse_encoding
from coursepack.data.store import StorePlan, StoreWriter, load_manifest
from coursepack.data.store.contents import list_key
from coursepack.data.store.done import done_key
from coursepack.data.store.layout import block_count, shard_key
from coursepack.data.store.locations import open_location
from coursepack.data.store.records import reduce_records
from coursepack.data.store.shards import ABSENT, CHECKSUM_BYTES, checksum, checksum_bytes, shard_size
from coursepack.data.store.zarr_metadata import zarr_keys
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.setup.prepare import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _harness import Row

    from coursepack.data import Source
    from coursepack.data.store import Manifest
    from coursepack.data.store.layout import ArrayLayout

RECIPE = PRESETS["digits"]
ENVIRONMENT = {"torch": "2.15.0", "device": "cuda", "batch_size": 256, "numerics": "0" * 64}
HISTOGRAM = {str(place): 1000 for place in range(100, 160)}
ENDS = 15
"""Number of views at the beginning and at the end that are committed from done-objects."""
START_UP = "<= 5"
GROWTH = "<= 1.2"


@dataclass(frozen=True)
class Size:
    """Size of the simulated stores."""

    samples: int
    classes: int
    views: int
    teachers: int
    encodings: tuple[str, ...]
    rounds: int
    block_rows: int | None = None


FULL = Size(13_153_500, 21_841, 300, 4, ("topk:100",), 6)
QUICK = Size(600, 30, 6, 2, ("topk:5",), 1, 100)


# Making the stores


def plan_of(size: Size, source: Source, encoding: str) -> StorePlan:
    """Return the plan of one teacher's store."""
    preprocessing = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    return StorePlan(
        identity={
            "teacher": {"network": "simulated", "weights": "0" * 64, "preprocessing": preprocessing},
            "view": {
                "recipe": RECIPE.model_dump(mode="json"),
                "fingerprint": view_fingerprint(RECIPE, source),
            },
            "source": {"name": source.name, "fingerprint": source.fingerprint},
            "precision": "float32",
        },
        origin={},
        labels=source.labels,
        class_names=source.class_names,
        views=size.views,
        arrays={"logits": (parse_encoding(encoding), (size.classes,))},
        block_rows=size.block_rows,
    )


def done_entries(manifest: Manifest, made: MadeViews, view: int, *, known: bool) -> list[dict[str, Any]]:
    """Return the done-objects of a view's blocks, as if their files were written.

    Digests of view parameters are right for the block that a training checks, and made up for the others.
    """
    layouts, entries = manifest.arrays["logits"].components, []
    blocks = block_count(manifest.samples, manifest.block_rows)
    probes = made.pixels(view, 8, tuple(probe_samples(manifest.samples, view).tolist())) if known else {}
    for index in range(blocks):
        first = index * manifest.block_rows
        last = min(first + manifest.block_rows, manifest.samples)
        files = {}
        for component, layout in layouts.items():
            for start in range(first, last, layout.shard_rows):
                rows = min(layout.shard_rows, last - start)
                key = shard_key(f"logits/{component}", view, start // layout.shard_rows, layout)
                files[key] = [shard_size(rows, layout), zeros_checksum(layout, rows)]
        drawn = made.drawn(view, first, last) if known and index == view % blocks else "00000000"
        numbers = {"rows": last - first, "sum": 1.0, "largest": 0.1, "histogram": HISTOGRAM}
        record = {
            "draws": drawn,
            "environment": ENVIRONMENT,
            "sums": {"rows": float(last - first), "correct": 1.0, "cross_entropy": 1.0, "entropy": 1.0},
            "fidelity": {"T=1": numbers, "T=4": numbers},
            **({"content": "00000000"} if view == 0 else {}),
            "probes": {k: v for k, v in probes.items() if first <= int(k) < last},
        }
        entries.append({"arrays": ["logits"], "files": files, "record": record})
    return entries


def with_entries(manifest: Manifest, view: int, entries: list[dict[str, Any]]) -> Manifest:
    """Return a manifest with a view, as a commit makes it from done-objects."""
    files = {key: (size, crc) for entry in entries for key, (size, crc) in entry["files"].items()}
    record = reduce_records([entry["record"] for entry in entries])
    return manifest.with_view(view, ["logits"], files, record)


_checksums: dict[tuple[ArrayLayout, int], int] = {}


def zeros_checksum(layout: ArrayLayout, rows: int) -> int:
    """Return the checksum of a shard whose rows are zeros."""
    place = (layout, rows)
    if place not in _checksums:
        footer, _ = footer_of(layout, rows)
        sums = chunk_checksum(layout) * -(-rows // layout.chunk_rows)
        _checksums[place] = checksum(sums + checksum_bytes(footer))
    return _checksums[place]


def chunk_checksum(layout: ArrayLayout) -> bytes:
    """Return the stored checksum of a chunk of zeros."""
    return checksum_bytes(bytes(layout.chunk_rows * layout.row_bytes))


def footer_of(layout: ArrayLayout, rows: int) -> tuple[bytes, int]:
    """Return the index of a shard, and the size of one of its chunks with its checksum."""
    step = layout.chunk_rows * layout.row_bytes + CHECKSUM_BYTES
    index = np.full((layout.shard_rows // layout.chunk_rows, 2), ABSENT, dtype="<u8")
    count = -(-rows // layout.chunk_rows)
    index[:count, 0], index[:count, 1] = np.arange(count) * step, step
    return index.tobytes(), step


def make_first_view(path: Path, manifest: Manifest) -> None:
    """Make the data files of view 0 as sparse files of zeros, with their checksums and indices."""
    for component, layout in manifest.arrays["logits"].components.items():
        own = chunk_checksum(layout)
        for shard in range(layout.shard_count(manifest.samples)):
            rows = min(layout.shard_rows, manifest.samples - shard * layout.shard_rows)
            footer, step = footer_of(layout, rows)
            file = path / shard_key(f"logits/{component}", 0, shard, layout)
            with file.open("wb") as out:
                for chunk in range(-(-rows // layout.chunk_rows)):
                    out.seek((chunk + 1) * step - CHECKSUM_BYTES)
                    out.write(own)
                out.write(footer + checksum_bytes(footer))


def make_sparse(path: Path, manifest: Manifest) -> int:
    """Make the data files of all other views as empty files of the right size; returns their number."""
    made = 0
    for component, layout in manifest.arrays["logits"].components.items():
        for view in range(1, manifest.views):
            for shard in range(layout.shard_count(manifest.samples)):
                rows = min(layout.shard_rows, manifest.samples - shard * layout.shard_rows)
                name = path / shard_key(f"logits/{component}", view, shard, layout)
                descriptor = os.open(name, os.O_WRONLY | os.O_CREAT, 0o666)
                os.truncate(descriptor, shard_size(rows, layout))
                os.close(descriptor)
                made += 1
    return made


def copies_of(path: Path, count: int) -> list[Path]:
    """Return a store and copies of it for other teachers, with the same files by hard links."""
    paths = [path]
    for number in range(1, count):
        other = path.with_name(f"{number}{path.name}")
        for file in path.rglob("*"):
            if file.is_file() and (file.name[:2] != "c." or file.name.startswith("c.0")):
                target = other / file.relative_to(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.hardlink_to(file)
        manifest = load_manifest(path)
        teacher = {**manifest.identity["teacher"], "weights": f"{number:064x}"}
        changed = replace(manifest, identity={**manifest.identity, "teacher": teacher})
        (other / "manifest.json").unlink()
        (other / "manifest.json").write_text(changed.to_json())
        paths.append(other)
    return paths


# Measuring


@contextmanager
def watched() -> Iterator[list[float]]:
    """Find the largest anonymous memory in MB beyond that at the start."""
    found, over, start = [0.0], threading.Event(), anonymous()

    def watch() -> None:
        while not over.wait(0.005):
            found[0] = max(found[0], (anonymous() - start) / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def anonymous() -> int:
    """Return the anonymous memory of this process in bytes."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Return the CPU seconds of each of some rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return seconds


class Counting:
    """Number of calls of a location's methods, each of which is a request in a bucket."""

    def __init__(self, location: Any) -> None:
        self.calls: dict[str, int] = {}
        self._is_inside = False
        for name in ("get", "get_tagged", "tag", "size", "put", "create", "replace", "delete", "names"):
            setattr(location, name, self._counted(name, getattr(location, name)))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._is_inside:  # a local location is made of calls that a bucket needs no request for
                return method(*arguments, **options)
            self.calls[name] = self.calls.get(name, 0) + 1
            self._is_inside = True
            try:
                return method(*arguments, **options)
            finally:
                self._is_inside = False

        return call


def write(path: Path, size: Size, source: Source, plan: StorePlan, name: str) -> list[Row]:
    """Make a store, and measure what grows while it is written."""
    made = MadeViews(source, RECIPE)
    checked = {size.views * k // 64 for k in range(64)} if size.views > 64 else set(range(size.views))
    config = {"views": size.views, "samples": size.samples}
    location = open_location(path)
    counting = Counting(location)
    early: list[float] = []
    late: list[float] = []
    ends = min(ENDS, size.views // 3)
    with watched() as memory, StoreWriter(location, plan) as writer:
        counting.calls.clear()
        left = timed(writer.done_rows, 1)
        at_start = sum(counting.calls.values())
        for view in range(size.views):
            entries = done_entries(writer.manifest, made, view, known=view in checked)
            if ends <= view < size.views - ends:
                writer._update(partial(with_entries, view=view, entries=entries))
                continue
            for index, entry in enumerate(entries):
                location.put(done_key(view, index), canonical_json(entry).encode())
            waiting = len(location.names("blocks"))
            counting.calls.clear()
            (early if view < ends else late).extend(timed(writer.commit, 1))
        requests = sum(counting.calls.values())
    blocks = block_count(size.samples, writer.manifest.block_rows)
    return [
        exact(f"{name}: blocks a view", blocks, "blocks", config),
        exact(f"{name}: done-objects at most, with one view in work", waiting, "objects", config),
        row(f"{name}: what is left at the start of `precompute run`", left, "CPU s", config),
        exact(f"{name}: requests for that", at_start, "requests", config),
        row(f"{name}: commit of a view", late, "CPU s", config),
        exact(f"{name}: requests of a commit", requests, "requests", config),
        row(
            f"{name}: commit, last views / first views",
            [each / statistics.median(early) for each in late],
            "ratio",
            config,
            GROWTH,
        ),
        row(f"{name}: memory of writing all views", memory, "MB", config),
    ]


def contents(path: Path, size: Size, name: str) -> list[Row]:
    """Count objects and bytes of the manifest."""
    manifest = load_manifest(path)
    layouts = manifest.arrays["logits"].components.values()
    files = size.views * sum(layout.shard_count(size.samples) for layout in layouts) + len(manifest.tables)
    lists = [(path / list_key(view, digest)).stat().st_size for view, digest in manifest.list_digests.items()]
    config = {"views": size.views, "samples": size.samples, "classes": size.classes}
    objects = files + len(lists) + len(zarr_keys(manifest)) + 1
    return [
        exact(f"{name}: objects of a store", objects, "objects", config),
        exact(f"{name}: data of a store", manifest.data_bytes / 1e12, "TB", config),
        exact(f"{name}: manifest", (path / "manifest.json").stat().st_size / 1e6, "MB", config),
        exact(f"{name}: list of a view", max(lists) / 1e6, "MB", config),
    ]


def reading(path: Path, size: Size, name: str, *, sparse: bool) -> list[Row]:
    """Measure opening, listing and validation."""
    config = {"views": size.views, "samples": size.samples}
    location = open_location(path)
    with watched() as memory:
        opened = timed(lambda: load_manifest(path), size.rounds)
    rows = [
        row(f"{name}: open", opened, "CPU s", config),
        row(f"{name}: memory of opening", memory, "MB", config),
    ]
    with watched() as memory:
        lists = timed(lambda: sum(len(entry.files) for entry in load_manifest(path).entries.values()), 1)
    rows += [
        row(f"{name}: read and validate all lists", lists, "CPU s", config),
        row(f"{name}: memory of that", memory, "MB", config),
    ]
    if not sparse:
        return rows
    folders = [f"logits/{component}" for component in load_manifest(path).arrays["logits"].components]
    listed = timed(lambda: [location.names(folder) for folder in folders], 1)
    manifest = load_manifest(path)

    def sizes() -> None:
        for key, (size, _) in manifest.files.items():
            if key.startswith("logits/") and location.size(key) != size:
                raise SystemExit(f"{key} has another size")

    return [
        *rows,
        row(f"{name}: list all data files (local)", listed, "CPU s", config),
        row(f"{name}: compare sizes of all data files (local)", timed(sizes, 1), "CPU s", config),
    ]


def start_up(paths: list[Path], size: Size, name: str) -> list[Row]:
    """Measure the start-up of a student: sources and stores opened, and its first targets read."""
    recipe = TrainRecipe.model_validate(
        {
            "student": "digits-small",
            "method": "kd",
            "stores": [str(path) for path in paths],
            "source": source_name(size),
            "evaluation": source_name(size).replace(":train", ":test"),
            "view": RECIPE,
            "objective": resolve_objective("kd", {}, name, classes=size.classes),
            "epochs": 1,
            "reading": "windowed",
        }
    )
    opening, first, order = [], [], []
    with watched() as memory:
        for _ in range(size.rounds):
            started = time.process_time()
            setup = prepare(recipe, torch.device("cpu"))
            opened = time.process_time()
            setup.targets.open(0)  # type: ignore[union-attr]  # a recipe with stores has targets
            read = time.process_time()
            batches = setup.batches(0)
            batch = next(batches)
            for reader in setup.readers:  # rows of zeros are not valid ones of every encoding
                reader.components("logits", 0, batch.samples)
            done = time.process_time()
            batches.close()  # type: ignore[attr-defined]  # a generator
            opening.append(opened - started)
            first.append(read - opened)
            order.append(done - read)
    whole = [sum(each) for each in zip(opening, first, order, strict=True)]
    config = {"views": size.views, "samples": size.samples, "teachers": size.teachers}
    return [
        row(f"{name}: start-up of a student", whole, "CPU s", config, START_UP),
        row(f"{name}: of that, sources and stores", opening, "CPU s", config),
        row(f"{name}: of that, first view", first, "CPU s", config),
        row(f"{name}: of that, order of the epoch and first targets", order, "CPU s", config),
        row(f"{name}: memory of start-up", memory, "MB", config),
    ]


def source_name(size: Size) -> str:
    """Return the name of the source."""
    return f"fake,classes={size.classes},size=8,samples={size.samples},channels=3:train"


def simulate(folder: Path, size: Size) -> list[Row]:
    """Make and measure the stores."""
    rows = []
    source = open_source(source_name(size))
    for encoding in size.encodings:
        path, plan = folder / f"{encoding.replace(':', '')}.zarr", plan_of(size, source, encoding)
        with mock.patch.object(os, "fsync"):
            rows += write(path, size, source, plan, encoding)
            make_first_view(path, load_manifest(path))
        rows += contents(path, size, encoding)
        rows += start_up(copies_of(path, size.teachers), size, encoding)
        make_sparse(path, load_manifest(path))
        rows += reading(path, size, encoding, sparse=True)
    return rows


def main() -> None:
    chosen = arguments("Stores at the size of ImageNet-21k x 300 views x 4 teachers.").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = simulate(Path(folder), QUICK if chosen.quick else FULL)
    report("Simulation", rows, chosen.json)


if __name__ == "__main__":
    main()
