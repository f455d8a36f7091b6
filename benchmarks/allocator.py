"""Times of steps with freed memory kept and with freed memory returned (`coursepack.allocator`).

    python benchmarks/allocator.py [--json FILE] [--quick]

Two child processes, one that keeps freed memory and one that returns it, take turns with the same work on
the CPU: training steps of resnet20 at batch size 64, and forward passes of resnet56 at batch size 256. The
setting cannot be undone within a process.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from _harness import alternate, arguments, exact, ratios, report, row

from coursepack.allocator import keep_freed_memory
from coursepack.models.build import build_network

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from _harness import Row

WORK = {"training step": ("resnet20", 64), "forward pass": ("resnet56", 256)}
MODES = ("kept", "returned")
STEPS = 4
"""Steps of a turn."""
WARM_UP = 3


class Child:
    """Process that takes turns."""

    def __init__(self, mode: str, what: str, batch_size: int, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")  # a fork of this process would share its memory
        self._pipe, pipe = context.Pipe()
        self._process = context.Process(target=child, args=(pipe, mode, what, batch_size, threads))
        self._process.start()
        pipe.close()
        self.told: dict[str, float] = {}

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def turn(self) -> float:
        """Take a turn, and return the seconds of a step."""
        self._pipe.send(None)
        self.told = self._pipe.recv()
        return self.told["seconds"]


def work(what: str, batch_size: int) -> Callable[[], None]:
    """Return a function that does the work once."""
    network = build_network(WORK[what][0], 100).module
    images = torch.rand(batch_size, 3, 32, 32)
    labels = torch.randint(0, 100, (batch_size,))
    if what == "forward pass":
        network.eval()
        return torch.inference_mode()(lambda: network(images))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def child(pipe: Connection, mode: str, what: str, batch_size: int, threads: int) -> None:
    """Take a turn for every message of a pipe, and answer with seconds and page faults of a step."""
    if mode == "kept":
        keep_freed_memory()
    torch.set_num_threads(threads)
    step = work(what, batch_size)
    for _ in range(WARM_UP):
        step()
    with suppress(EOFError):
        while True:
            pipe.recv()
            pipe.send(turn(step))


def turn(step: Callable[[], None]) -> dict[str, float]:
    """Return the seconds and page faults of a step, and the peak memory in kB."""
    faults, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds / STEPS, "faults": (used.ru_minflt - faults) / STEPS, "peak": used.ru_maxrss}


def rows_of(what: str, threads: int, batch_size: int, rounds: int) -> list[Row]:
    """Measure one kind of work."""
    config: dict[str, Any] = {"network": WORK[what][0], "batch_size": batch_size, "threads": threads}
    name = f"{what}, {threads} thread{'s' if threads > 1 else ''}"
    with ExitStack() as stack:
        children = {mode: stack.enter_context(Child(mode, what, batch_size, threads)) for mode in MODES}
        seconds = alternate({mode: each.turn for mode, each in children.items()}, rounds)
        return [
            row(f"{name}: kept / returned", ratios(seconds, *MODES), "ratio", config),
            *(row(f"{name}: {mode}", [1e3 * each for each in seconds[mode]], "ms", config) for mode in MODES),
            *(
                exact(f"{name}: page faults, {mode}", children[mode].told["faults"], "faults", config)
                for mode in MODES
            ),
            *(
                exact(f"{name}: peak memory, {mode}", children[mode].told["peak"] / 1e3, "MB", config)
                for mode in MODES
            ),
        ]


def main() -> None:
    chosen = arguments("Steps with freed memory that is kept, and with memory that is returned.").parse_args()
    if chosen.quick:
        rows = rows_of("forward pass", 1, batch_size=2, rounds=2)
    else:
        rows = [
            entry
            for what, (_, batch_size) in WORK.items()
            for threads in (1, 2)
            for entry in rows_of(what, threads, batch_size, rounds=12)
        ]
    report("Freed memory", rows, chosen.json)


if __name__ == "__main__":
    main()
