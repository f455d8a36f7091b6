"""Fused loss on a GPU: time by CUDA events, kernel launches, and the ratio to the memory bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from _harness import row
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Loss = Callable[[Tensor, Any], Tensor]

CELLS = ((128, 100, 4), (1024, 1000, 4), (1024, 1000, 8), (256, 21841, 2))
COPIED_BYTES = 1 << 30


class Cold:
    """Inputs in 64 copies that exceed the cache; each call uses the next copy."""

    def __init__(self, rows: int, classes: int, count: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        options = {"device": "cuda", "generator": generator}
        self.student = torch.randn(rows, classes, **options).mul_(3)
        self.teachers = torch.randn(count, rows, classes, **options).mul_(3).half()
        cache = torch.cuda.get_device_properties().L2_cache_size
        # Every input is read once, and the gradient is written once.
        self.moved = 2 * self.student.nbytes + self.teachers.nbytes
        copies = max(2, min(64, 4 * cache // self.moved))
        self.students = [self.student.clone().requires_grad_(True) for _ in range(copies)]
        self.all_teachers = [self.teachers.clone() for _ in range(copies)]

    def steps(self, loss: Loss) -> None:
        """Run forward and backward for every copy."""
        for student, teachers in zip(self.students, self.all_teachers, strict=True):
            loss(student, teachers).backward()
            student.grad = None


def microseconds(run: Callable[[], None], calls: int, rounds: int) -> list[float]:
    """Return the time per call in each round, by CUDA events, after three warm-ups; `run` makes `calls`."""
    for _ in range(3):
        run()
    result = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        result.append(1000 * start.elapsed_time(stop) / calls)
    return result


def graph_of(run: Callable[[], None]) -> Callable[[], None]:
    """Return a function that replays `run` from a CUDA graph, without Python overhead."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def launches(run: Callable[[], None], calls: int) -> float:
    """Return the number of kernel launches per call, measured by the profiler."""
    run()
    with torch.profiler.profile() as profile:
        run()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device) / calls


def bytes_per_microsecond(rounds: int) -> float:
    """Return the memory bandwidth of a large copy, counting bytes read and written."""
    origin = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(origin)
    return 2 * COPIED_BYTES / min(microseconds(lambda: target.copy_(origin), 1, rounds))


def table(variants: dict[str, Loss], rounds: int) -> list[dict[str, Any]]:
    """Return the report's rows for every cell and variant; each loss is the mean over a batch."""
    rate = bytes_per_microsecond(rounds)
    result = []
    for rows, classes, count in CELLS:
        cold = Cold(rows, classes, count)
        calls, floor = len(cold.students), cold.moved / rate
        for name, loss in variants.items():
            run = lambda cold=cold, loss=loss: cold.steps(loss)  # noqa: E731 - binds the loop variables
            config = {"N": rows, "C": classes, "K": count, "device": torch.cuda.get_device_name()}
            identifier = f"CUDA ({rows},{classes},{count}) {name}"
            result.append(row(identifier, microseconds(run, calls, rounds), "us", config))
            replayed = microseconds(graph_of(run), calls, rounds)
            result.append(row(f"{identifier} in a graph", replayed, "us", config))
            ratio = [each / floor for each in replayed]
            result.append(row(f"{identifier} in a graph / memory floor", ratio, "ratio", config))
            result.append(row(f"{identifier} launches", [launches(run, calls)], "kernels", config))
    return result
