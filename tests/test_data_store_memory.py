"""A store larger than a process may hold is written and read within that limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES, WIDTH, VIEWS = 40_000, 1000, 2
LIMIT = 96 << 20
"""Bytes that a process may take beyond what it has after importing everything; a view has 160 MB."""

# Writes or reads in its own process: the limit cannot be taken back.
WORK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
torch.set_num_threads(1)
from helpers import RowStore, write_rows
from coursepack.data import epoch_order
from coursepack.data.batches import Window
from coursepack.data.store import StoreReader, StoreWriter
import coursepack.data.store.jit_gather, coursepack.data.jit_philox

samples, width, views, limit = map(int, sys.argv[4:])
path, reading = Path(sys.argv[2]), sys.argv[3]

class Wide(RowStore):
    def rows(self, view, chosen):
        return (chosen[:, None] * 7 + np.arange(width) + view).astype(np.float32)

    def write_block(self, writer, block):
        files = writer.write(block, {"draws": "", "environment": {}})
        for start in range(0, len(block), 500):
            files.add({"logits": self.rows(block.view, block.samples[start : start + 500])})
        files.finish({"rows": float(len(block))})

store = Wide(samples=samples, views=views, block_rows=None, shapes={"logits": (width,)})
store.labels
write_rows(path.with_name("warm.zarr"), RowStore(samples=5))
for way in ("windowed", "mapped"):
    StoreReader(path.with_name("warm.zarr"), way).components("logits", 0, np.arange(5))
used = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
used = int(used[0].split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit,) * 2)
if reading == "write":
    write_rows(path, store)
else:
    reader = StoreReader(path, reading)
    window = Window(reader.chunk_rows(["logits"]), 16)
    assert reader.view_bytes(["logits"]) > 1.5 * limit
    for view in range(views):
        order = epoch_order(np.arange(samples), seed=0, epoch=view, window=window)
        for start in range(0, samples, 256):
            chosen = order[start : start + 256]
            found = reader.components("logits", view, chosen)["values"]
            assert np.array_equal(found, store.rows(view, chosen))
print("done")
"""


def run(path, reading):
    numbers = map(str, (SAMPLES, WIDTH, VIEWS, LIMIT))
    command = [sys.executable, "-c", WORK, str(Path(__file__).parent), str(path), reading, *numbers]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_store_beyond_the_limit_is_written_and_read(tmp_path):
    written = run(tmp_path / "s.zarr", "write")
    assert written.stdout == "done\n", written.stderr[-2000:]
    for reading in ("windowed", "mapped"):
        read = run(tmp_path / "s.zarr", reading)
        assert read.stdout == "done\n", read.stderr[-2000:]
    # The limit is real: whole views in memory do not fit.
    assert "MemoryError" in run(tmp_path / "s.zarr", "resident").stderr
