"""Reading and writing of stores, compared with memory, plain files, zarr-python and other projects' formats.

    python benchmarks/store.py [--json FILE] [--quick]

Logits are float16 with C = 1000 unless a row has other values. Ratios are of runs that alternate within this
process, with all files in the page cache. `a / b` is time a over time b; a speed relative to b is written
`speed vs b`.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import zarr
from _content import BATCH, LOGITS, Shuffle, logits, write_store
from _harness import PATIENCE, Threads, arguments, exact, measure, ratios, report, row
from _peers import peers
from _store_growth import FULL_GROWTH, QUICK_GROWTH, view_growth
from torch import nn

from coursepack.allocator import keep_freed_memory
from coursepack.data.encodings import parse_encoding
from coursepack.data.store import StoreReader, read_together
from coursepack.data.store.gather import copy_rows
from coursepack.data.store.layout import plan_array, plan_block_rows
from coursepack.data.store.shards import checksum, shard_checksum, shard_pieces
from coursepack.files import write_whole
from coursepack.kernels import soft_target_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from _harness import Row, Seconds


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    rows: int = 65_536
    peer_rows: int = 8_192
    batches: int = 32
    rounds: int = 15
    step_rounds: int = 120
    patience: float = PATIENCE

    @property
    def few_rounds(self) -> int:
        """Number of rounds of long measurements; a bar needs at least six."""
        return min(6, self.rounds)


FULL = Size()
QUICK = Size(rows=1_024, peer_rows=256, batches=2, rounds=1, step_rounds=1, patience=0)


def reading(folder: Path, values: np.ndarray, size: Size) -> list[Row]:
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
    config = {"rows": len(values), "classes": values.shape[1], "batch": BATCH, "torch threads": 1}

    def rows_of(seconds: Seconds) -> list[Row]:
        return [
            row("store, shuffled batch", [1e6 * s / size.batches for s in seconds["store"]], "us", config),
            row("speed vs memory index_select", ratios(seconds, "memory", "store"), "x", config, ">= 0.90"),
            row("speed vs np.memmap[idx]", ratios(seconds, "memmap", "store"), "x", config),
            # With a warm page cache, np.memmap is a plain gather too.
            row("memory's speed vs np.memmap[idx]", ratios(seconds, "memmap", "memory"), "x", config),
        ]

    few = Shuffle(len(values), 1)
    slow = {
        "store": few.each(lambda samples: reader.rows(LOGITS, 0, samples)),
        "zarr": few.each(lambda samples: foreign.oindex[0, np.sort(samples)]),
    }

    def against_zarr(seconds: Seconds) -> list[Row]:
        return [row("speed vs zarr-python", ratios(seconds, "zarr", "store"), "x", config, ">= 100")]

    with Threads(1):
        rows = measure(variants, size.rounds, rows_of, patience=size.patience)
        rows += measure(slow, size.few_rounds, against_zarr, patience=size.patience)
    return rows + first_epoch(folder, half, size, config)


def first_epoch(folder: Path, half: torch.Tensor, size: Size, config: dict[str, Any]) -> list[Row]:
    """Measure reading every row once on a fresh mapping, and separately opening it with its checksums."""
    order = np.random.default_rng(3).permutation(len(half))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    out = torch.empty(BATCH, half.shape[1], dtype=torch.float16)
    opening: list[float] = []
    faults: list[float] = []

    def store() -> float:
        started = time.perf_counter()
        reader = StoreReader(folder / "float16.zarr")
        reader.components(LOGITS, 0, order[:1])
        opening.append(1000 * (time.perf_counter() - started))
        before = page_faults()
        started = time.perf_counter()
        for batch in batches:
            reader.rows(LOGITS, 0, batch)
        seconds = time.perf_counter() - started
        faults.append(page_faults() - before)
        return seconds

    def memory() -> None:
        for batch in batches:
            torch.index_select(half, 0, torch.from_numpy(batch), out=out[: len(batch)])

    def rows_of(seconds: Seconds) -> list[Row]:
        return [
            row("first epoch, speed vs memory", ratios(seconds, "memory", "store"), "x", config, ">= 0.6"),
            # The first value of each is from the warm-up.
            row("page faults of the first epoch", faults[1:], "faults", config),
            row("opening a view, checksums included", opening[1:], "ms", config),
        ]

    with Threads(1):
        return measure({"store": store, "memory": memory}, size.few_rounds, rows_of, patience=size.patience)


def page_faults() -> int:
    """Return the number of page faults of this process so far, without those that read from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def four_teachers(folder: Path, values: np.ndarray, size: Size) -> list[Row]:
    """Measure reading four stores against reading four tensors in memory."""
    readers = [write_store(folder / f"t{k}.zarr", values, encoding="float16") for k in range(4)]
    tensors = [torch.from_numpy(values).half() for _ in readers]
    outs = [torch.empty(BATCH, values.shape[1], dtype=torch.float16) for _ in readers]
    shuffle = Shuffle(len(values), size.batches)
    wanted = [(reader, LOGITS) for reader in readers]
    table = np.concatenate([reader._opened(LOGITS, 0).table for reader in readers])
    whole = np.empty(BATCH * sum(table[:, 2]), dtype=np.uint8)

    def select(samples: np.ndarray) -> None:
        for tensor, out in zip(tensors, outs, strict=True):
            torch.index_select(tensor, 0, torch.from_numpy(samples), out=out)

    variants = {
        "stores": shuffle.each(partial(read_together, wanted, 0)),
        "tensors": shuffle.each(select),
        "copy": shuffle.each(lambda samples: copy_rows(table, len(values), samples, whole)),
    }
    config = {"rows": len(values), "classes": values.shape[1], "torch threads": 1}

    def rows_of(seconds: Seconds) -> list[Row]:
        both, copied = ratios(seconds, "stores", "tensors"), ratios(seconds, "copy", "tensors")
        return [
            row("four teachers / four tensors in memory", both, "ratio", config, "<= 1.05"),
            row("copying their rows only / four tensors in memory", copied, "ratio", config),
        ]

    with Threads(1):
        rows = measure(variants, size.rounds, rows_of, patience=size.patience)
    return rows + student_step(readers, values, size)


def student_step(readers: list[StoreReader], values: np.ndarray, size: Size) -> list[Row]:
    """Measure a step of about 50 ms on the CPU with targets from four stores or from tensors in memory."""
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1000)
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    images = torch.randn(BATCH, 1024)
    held = [torch.from_numpy(values).half() for _ in readers]

    fetch: dict[str, Callable[[np.ndarray], list[Any]]] = {
        "stores": partial(read_together, [(reader, LOGITS) for reader in readers], 0),
        "memory": lambda samples: [tensor[torch.from_numpy(samples)] for tensor in held],
    }
    fetching: Seconds = {name: [] for name in fetch}

    def step(samples: np.ndarray, name: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        teachers = fetch[name](samples)
        fetching[name].append(time.perf_counter() - started)
        soft_target_loss(student(images), teachers, temperature=4.0).mean().backward()
        optimizer.step()

    shuffle = Shuffle(len(values), 1)
    variants = {name: shuffle.each(partial(step, name=name)) for name in fetch}
    config = {"student": "mlp 1024-2048-2048-1000", "teachers": 4}

    def rows_of(seconds: Seconds) -> list[Row]:
        # The first value of each is from the warm-up.
        targets = {name: values[1:] for name, values in fetching.items()}
        return [
            row("student step from memory", [1000 * s for s in seconds["memory"]], "ms", config),
            row("its targets from memory", [1000 * s for s in targets["memory"]], "ms", config),
            row("its targets from stores", [1000 * s for s in targets["stores"]], "ms", config),
            row(
                "student step, stores / memory",
                ratios(seconds, "stores", "memory"),
                "ratio",
                config,
                "<= 1.01",
            ),
        ]

    return measure(variants, size.step_rounds, rows_of, patience=size.patience)


def decoding(folder: Path, values: np.ndarray, size: Size) -> list[Row]:
    full = torch.from_numpy(values)
    out = torch.empty(BATCH, values.shape[1])
    readers = {
        name: write_store(folder / f"{name.replace(':', '-')}.zarr", values, encoding=name)
        for name in ("int8", "topk:10", "topk16:10")
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
    config = {"rows": len(values), "classes": values.shape[1], "torch threads": 1}
    stored = torch.zeros(
        len(values), readers["topk:10"].view_bytes([LOGITS]) // len(values), dtype=torch.uint8
    )

    def least(samples: np.ndarray) -> None:
        torch.index_select(stored, 0, torch.from_numpy(samples))
        out.fill_(0)

    variants["least"] = shuffle.each(least)

    def rows_of(seconds: Seconds) -> list[Row]:
        int8, topk, topk16 = (ratios(seconds, name, "memory") for name in readers)
        limit = ratios(seconds, "least", "memory")
        return [
            row("int8 gather and decode / float32 memory", int8, "ratio", config, "<= 1.1"),
            row("topk:10 to dense / float32 memory", topk, "ratio", config, "<= 0.5"),
            row("gather of topk:10's bytes and a fill / float32 memory", limit, "ratio", config),
            row("topk16:10 to dense / float32 memory", topk16, "ratio", config),
        ]

    with Threads(1):
        return measure(variants, size.rounds, rows_of, patience=size.patience)


def loading(folder: Path, size: Size) -> list[Row]:
    raw = folder / "raw.bin"
    cached = np.ones(1 << 20, dtype=np.uint8)
    variants = {
        "store": lambda: StoreReader(folder / "float16.zarr", "resident").components(LOGITS, 0, np.arange(1)),
        "fromfile": lambda: np.fromfile(raw, dtype=np.uint8),
        "checksums": lambda: [checksum(cached) for _ in range(raw.stat().st_size // len(cached))],
    }
    config = {"bytes": raw.stat().st_size}

    def rows_of(seconds: Seconds) -> list[Row]:
        each = ratios(seconds, "store", "fromfile")
        limit = [1 + ratio for ratio in ratios(seconds, "checksums", "fromfile")]
        return [
            row("whole view into memory / np.fromfile", each, "ratio", config, "<= 1.2"),
            row("np.fromfile and checksums of cached data / np.fromfile", limit, "ratio", config),
        ]

    return measure(variants, size.rounds, rows_of, patience=size.patience)


def writing(folder: Path, values: np.ndarray, size: Size) -> list[Row]:
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

    config = {"bytes": half.nbytes, "shards": len(parts)}

    def rows_of(seconds: Seconds) -> list[Row]:
        each = ratios(seconds, "plain", "ours")
        return [row("write, speed vs raw write + fsync + rename", each, "x", config, ">= 0.75")]

    variants = {"ours": ours, "plain": plain}
    return measure(variants, size.few_rounds, rows_of, patience=size.patience)


def sizes() -> list[Row]:
    """Return bytes on disk over payload, from the layout: chunks with checksums, indices and padding."""
    rows = []
    for samples, classes in ((50_000, 100), (50_000, 1000), (1_281_167, 100), (1_281_167, 1000), (1_442, 10)):
        component = parse_encoding("float16").components((classes,))["values"]
        layout = plan_array(component, plan_block_rows(samples, [component.row_bytes]))
        chunks = -(-samples // layout.chunk_rows)
        index = 16 * (layout.shard_rows // layout.chunk_rows) + 4
        total = chunks * (layout.chunk_rows * layout.row_bytes + 4) + layout.shard_count(samples) * index
        config = {"rows": samples, "classes": classes, "shard rows": layout.shard_rows}
        ratio = total / (samples * layout.row_bytes)
        rows.append(exact(f"size / payload, N={samples} C={classes}", ratio, "ratio", config, "<= 1.001"))
    return rows


def main() -> None:
    chosen = arguments("Reading and writing stores.").parse_args()
    # As in every command.
    keep_freed_memory()
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
        rows += peers(folder, values[: size.peer_rows], size.few_rounds, size.patience)
        rows += view_growth(folder / "growth", QUICK_GROWTH if chosen.quick else FULL_GROWTH)
    report("Stores", rows, chosen.json)


if __name__ == "__main__":
    main()
