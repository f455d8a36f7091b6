"""Memory of writing, verifying, reading and training from stores larger than a process may hold.

    python benchmarks/memory.py [--json FILE] [--quick]

The figures are peak anonymous memory (RssAnon) above that of the process after every step has run once with
600 samples. Logits are float32, C = 1000, batch 256, with one process per store. RLIMIT_DATA is 32 MiB above
the initial memory, which is too little to read a whole view.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from _harness import arguments, report, row

if TYPE_CHECKING:
    from _harness import Row

PROCESS = Path(__file__).parents[1] / "tests" / "limited_process.py"
LIMIT = 32 << 20
ROW_BYTES = 4000
STORES = ((17_000, 2), (100_000, 2), (17_000, 12))
QUICK = ((10_000, 1),)
STEPS = ("write", "verify", "read", "train")
READINGS = ("windowed", "mapped")


def life(samples: int, views: int, steps: tuple[str, ...], readings: tuple[str, ...]) -> list[Row]:
    """Measure the anonymous memory in MB of each step from writing to training with one store."""
    limits = {"limit": LIMIT, "block_rows": 2000}
    wanted = {"samples": samples, "views": views, "steps": steps, "readings": readings, **limits}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROCESS), folder, json.dumps(wanted)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    told = json.loads(done.stdout)
    if not told["refused"]:
        raise SystemExit(
            f"A view of {samples} samples fitted into {LIMIT} bytes: the limit was not in force."
        )
    size = samples * views * ROW_BYTES / 1e6
    config = {"samples": samples, "views": views, **limits}
    return [
        row(f"{samples:,} samples, {views} views ({size:,.0f} MB): {step}", [grown / 1e6], "MB", config)
        for step, grown in told["grown"].items()
    ]


def main() -> None:
    chosen = arguments("Memory of stores larger than a process may hold.").parse_args()
    steps, readings = (STEPS[:2], READINGS[:1]) if chosen.quick else (STEPS, READINGS)
    stores = QUICK if chosen.quick else STORES
    rows = [entry for samples, views in stores for entry in life(samples, views, steps, readings)]
    report("Memory", rows, chosen.json)


if __name__ == "__main__":
    main()
