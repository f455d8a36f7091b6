"""Reading and writing stores, beside memory, plain files, zarr-python and the formats of other projects.

    python benchmarks/store.py [--json FILE] [--quick]

C = 1000 float16 unless a row says otherwise. Ratios are of runs alternated within this process; everything is
in the page cache. `a / b` is time a over time b; a speed relative to b is written `speed vs b`.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from _content import BATCH, LOGITS, Shuffle, logits, made_labels, write_store
from _harness import alternate, arguments, ratios, report, row
from _peers import digit_logits, fidelities, peers
from torch import nn

from coursepack.data.encodings import parse_encoding
from coursepack.data.store import StoreReader
from coursepack.data.store.layout import plan_array, plan_block_rows
from coursepack.data.store.shards import shard_checksum, shard_pieces
from coursepack.files import write_whole
from coursepack.kernels import soft_target_loss


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    rows: int = 65_536
    peer_rows: int = 8_192
    batches: int = 32
    rounds: int = 15
    step_rounds: int = 60


FULL = Size()
QUICK = Size(rows=2_048, peer_rows=512, batches=4, rounds=2, step_rounds=3)


def reading(folder: Path, values: np.ndarray, size: Size) -> list[dict[str, Any]]:
    half = torch.from_numpy(values).half()
    raw = folder / "raw.bin"
    half.numpy().tofile(raw)
    memmap = np.memmap(raw, dtype=np.float16, mode="r", shape=values.shape)
    write_store(folder / "float16.zarr", values, encoding="float16")
    reader = StoreReader(folder / "float16.zarr", "resident")
    out = torch.empty(BATCH, values.shape[1], dtype=torch.float16)
    foreign = zarr.open_group(folder / "float16.zarr", mode="r")["logits/values"]
    shuffle = Shuffle(len(values), size.batches)
    variants = {
        "store": shuffle.each(lambda samples: reader.rows(LOGITS, 0, samples)),
        "memory": shuffle.each(
            lambda samples: torch.index_select(half, 0, torch.from_numpy(samples), out=out)
        ),
        "memmap": shuffle.each(lambda samples: memmap[samples]),
    }
    with Threads(1):
        seconds = alternate(variants, size.rounds)
    config = {"rows": len(values), "classes": values.shape[1], "batch": BATCH, "torch threads": 1}
    rows = [
        row("store, shuffled batch", [1e6 * s / size.batches for s in seconds["store"]], "us", config),
        row("speed vs memory index_select", ratios(seconds, "memory", "store"), "x", config, ">= 0.90"),
        row("speed vs np.memmap[idx]", ratios(seconds, "memmap", "store"), "x", config, ">= 1.8"),
    ]
    few = Shuffle(len(values), 1)
    slow = {
        "store": few.each(lambda samples: reader.rows(LOGITS, 0, samples)),
        "zarr": few.each(lambda samples: foreign.oindex[0, np.sort(samples)]),
    }
    seconds = alternate(slow, max(3, size.rounds // 3))
    rows.append(row("speed vs zarr-python", ratios(seconds, "zarr", "store"), "x", config, ">= 100"))
    return rows + first_epoch(folder, half, size, config)


def first_epoch(folder: Path, half: torch.Tensor, size: Size, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row once on a fresh mapping; opening it, with its checksums, is timed apart."""
    order = np.random.default_rng(3).permutation(len(half))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    out = torch.empty(BATCH, half.shape[1], dtype=torch.float16)
    opening, speed, faults = [], [], []
    for _ in range(max(3, size.rounds // 3)):
        started = time.perf_counter()
        reader = StoreReader(folder / "float16.zarr")
        reader.components(LOGITS, 0, order[:1])
        opening.append(1000 * (time.perf_counter() - started))
        before = page_faults()
        started = time.perf_counter()
        for batch in batches:
            reader.rows(LOGITS, 0, batch)
        ours = time.perf_counter() - started
        faults.append(page_faults() - before)
        with Threads(1):
            started = time.perf_counter()
            for batch in batches:
                torch.index_select(half, 0, torch.from_numpy(batch), out=out[: len(batch)])
            speed.append((time.perf_counter() - started) / ours)
    return [
        row("first epoch, speed vs memory", speed, "x", config, ">= 0.6"),
        row("page faults of the first epoch", faults, "faults", config),
        row("opening a view, checksums included", opening, "ms", config),
    ]


def page_faults() -> int:
    """Of this process so far, without those that read from the disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def four_teachers(folder: Path, values: np.ndarray, size: Size) -> list[dict[str, Any]]:
    """Four stores against one; beside them what limits that: tensors in memory, and one store as long."""
    readers = [write_store(folder / f"t{k}.zarr", values, encoding="float16") for k in range(4)]
    long = write_store(folder / "long.zarr", np.concatenate([values] * 4), encoding="float16")
    tensors = [torch.from_numpy(values).half() for _ in readers]
    outs = [torch.empty(BATCH, values.shape[1], dtype=torch.float16) for _ in readers]
    shuffle, wide = Shuffle(len(values), size.batches), Shuffle(4 * len(values), size.batches)

    def select(samples: np.ndarray, count: int) -> None:
        for tensor, out in zip(tensors[:count], outs, strict=False):
            torch.index_select(tensor, 0, torch.from_numpy(samples), out=out)

    one = shuffle.each(lambda samples: readers[0].rows(LOGITS, 0, samples))
    pairs = {
        "four teachers / 4 x one": (
            shuffle.each(lambda samples: [reader.rows(LOGITS, 0, samples) for reader in readers]),
            one,
        ),
        "four tensors in memory / 4 x one": (
            shuffle.each(lambda samples: select(samples, 4)),
            shuffle.each(lambda samples: select(samples, 1)),
        ),
        "a store of 4 x the rows / one": (wide.each(lambda samples: long.rows(LOGITS, 0, samples)), one),
    }
    config = {"rows": len(values), "classes": values.shape[1], "torch threads": 1}
    rows = []
    for name, (many, single) in pairs.items():
        with Threads(1):
            seconds = alternate({"many": many, "single": single}, size.rounds)
        times = 4 if name.endswith("4 x one") else 1
        each = [ratio / times for ratio in ratios(seconds, "many", "single")]
        rows.append(row(name, each, "ratio", config, "<= 1.2" if name.startswith("four teachers") else None))
    return rows + student_step(readers, values, size)


def student_step(readers: list[StoreReader], values: np.ndarray, size: Size) -> list[dict[str, Any]]:
    """A step of about 50 ms on the CPU, targets from four stores or from tensors in memory."""
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1000)
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    images = torch.randn(BATCH, 1024)
    held = [torch.from_numpy(values).half() for _ in readers]

    def step(teachers: list[Any]) -> None:
        optimizer.zero_grad(set_to_none=True)
        soft_target_loss(student(images), teachers, temperature=4.0).mean().backward()
        optimizer.step()

    shuffle = Shuffle(len(values), 1)
    variants = {
        "stores": shuffle.each(lambda samples: step([reader.rows(LOGITS, 0, samples) for reader in readers])),
        "memory": shuffle.each(lambda samples: step([t[torch.from_numpy(samples)] for t in held])),
    }
    seconds = alternate(variants, size.step_rounds)
    config = {"student": "mlp 1024-2048-2048-1000", "teachers": 4}
    return [
        row("student step from memory", [1000 * s for s in seconds["memory"]], "ms", config),
        row("student step, stores / memory", ratios(seconds, "stores", "memory"), "ratio", config, "<= 1.01"),
    ]


def decoding(folder: Path, values: np.ndarray, size: Size) -> list[dict[str, Any]]:
    full = torch.from_numpy(values)
    out = torch.empty(BATCH, values.shape[1])
    readers = {
        name: write_store(folder / f"{name[:4]}.zarr", values, encoding=name) for name in ("int8", "topk:10")
    }
    shuffle = Shuffle(len(values), size.batches)
    variants = {
        "memory": shuffle.each(
            lambda samples: torch.index_select(full, 0, torch.from_numpy(samples), out=out)
        ),
        **{
            name: shuffle.each(lambda samples, reader=reader: reader.rows(LOGITS, 0, samples).decode(out=out))
            for name, reader in readers.items()
        },
    }
    with Threads(1):
        seconds = alternate(variants, size.rounds)
    config = {"rows": len(values), "classes": values.shape[1], "torch threads": 1}
    return [
        row(
            "int8 gather and decode / float32 memory",
            ratios(seconds, "int8", "memory"),
            "ratio",
            config,
            "<= 1.1",
        ),
        row(
            "topk:10 to dense / float32 memory",
            ratios(seconds, "topk:10", "memory"),
            "ratio",
            config,
            "<= 0.5",
        ),
    ]


def loading(folder: Path, size: Size) -> list[dict[str, Any]]:
    raw = folder / "raw.bin"
    variants = {
        "store": lambda: StoreReader(folder / "float16.zarr", "resident").components(LOGITS, 0, np.arange(1)),
        "fromfile": lambda: np.fromfile(raw, dtype=np.uint8),
    }
    seconds = alternate(variants, size.rounds)
    config = {"bytes": raw.stat().st_size}
    return [
        row(
            "whole view into memory / np.fromfile",
            ratios(seconds, "store", "fromfile"),
            "ratio",
            config,
            "<= 1.3",
        )
    ]


def writing(folder: Path, values: np.ndarray, size: Size) -> list[dict[str, Any]]:
    half = values.astype(np.float16)
    component = parse_encoding("float16").components(half.shape[1:])["values"]
    layout = plan_array(component, plan_block_rows(len(half), [component.row_bytes]))
    parts = [half[start : start + layout.shard_rows] for start in range(0, len(half), layout.shard_rows)]
    target = folder / "write"
    target.mkdir()

    def ours() -> None:
        for place, part in enumerate(parts):
            pieces = shard_pieces(part, layout)
            shard_checksum(pieces)
            write_whole(target / f"ours-{place}", *pieces)

    def plain() -> None:
        for place, part in enumerate(parts):
            with (target / "raw.tmp").open("wb") as file:
                file.write(memoryview(part).cast("B"))
                os.fsync(file.fileno())
            (target / "raw.tmp").replace(target / f"raw-{place}")

    seconds = alternate({"ours": ours, "plain": plain}, max(3, size.rounds // 2))
    config = {"bytes": half.nbytes, "shards": len(parts)}
    return [
        row(
            "write, speed vs raw write + fsync + rename",
            ratios(seconds, "plain", "ours"),
            "x",
            config,
            ">= 0.75",
        )
    ]


def sizes() -> list[dict[str, Any]]:
    """Bytes on disk over payload, from the layout: chunks with their checksums, indices, padding."""
    rows = []
    for samples, classes in ((50_000, 100), (50_000, 1000), (1_281_167, 100), (1_281_167, 1000), (1_442, 10)):
        component = parse_encoding("float16").components((classes,))["values"]
        layout = plan_array(component, plan_block_rows(samples, [component.row_bytes]))
        chunks = -(-samples // layout.chunk_rows)
        index = 16 * (layout.shard_rows // layout.chunk_rows) + 4
        total = chunks * (layout.chunk_rows * layout.row_bytes + 4) + layout.shard_count(samples) * index
        config = {"rows": samples, "classes": classes, "shard rows": layout.shard_rows}
        ratio = total / (samples * layout.row_bytes)
        rows.append(row(f"size / payload, N={samples} C={classes}", [ratio], "ratio", config, "<= 1.001"))
    return rows


class Threads:
    """A number of torch threads for a while: a gather is serial, and the floor beside it should be too."""

    def __init__(self, count: int) -> None:
        self._count, self._before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


def main() -> None:
    chosen = arguments("Reading and writing stores.").parse_args()
    size = QUICK if chosen.quick else FULL
    values = logits(size.rows, 1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = reading(folder, values, size)
        rows += four_teachers(folder, values, size)
        rows += decoding(folder, values, size)
        rows += loading(folder, size)
        rows += writing(folder, values, size)
        rows += sizes()
        rows += peers(folder, values[: size.peer_rows], max(3, size.rounds // 3))
        rows += fidelities(
            values[: size.peer_rows], "made up C=1000", made_labels(size.rows, 1000)[: size.peer_rows]
        )
        rows += fidelities(*digit_logits())
    report("Stores", rows, chosen.json)


if __name__ == "__main__":
    main()
