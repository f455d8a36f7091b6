"""Times, CUDA graphs, and counts of launches and synchronizations, on a CUDA device or on the CPU.

On CUDA, time is measured by events or around `synchronize`, never by a clock beside queued work. On the CPU a
launch is an ATen call that computes something, and a synchronization is an ATen call whose result Python
reads.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from _harness import alternate
from torch.utils._python_dispatch import TorchDispatchMode

from coursepack.console import inform

if TYPE_CHECKING:
    from collections.abc import Callable

    from _harness import Seconds

VIEWS = (
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "t", "transpose",
    "unbind", "unsqueeze", "view", "_unsafe_view",
)  # fmt: skip
READS = ("_local_scalar_dense", "equal", "masked_select", "nonzero", "unique2")
"""ATen calls whose result, or its shape, is read by Python: they wait for a device."""
SYNCHRONIZES = "called a synchronizing CUDA operation"
"""Part of torch's warning about a synchronization."""
WARM_UPS = 2
"""Calls of every variant before the harness's warm-up round; CUDA graphs and compilers need more than one."""


@dataclass
class Device:
    """Device that is measured, and the figures that it cannot give."""

    device: torch.device
    missing: dict[str, str] = field(default_factory=dict)
    """Reason for each figure that was left out."""

    @property
    def is_cuda(self) -> bool:
        """True for a CUDA device."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def leave_out(self, figure: str, reason: str) -> None:
        """Report that a figure is not measured."""
        if figure not in self.missing:
            inform(f"left out: {figure} ({reason})")
        self.missing[figure] = reason

    def timed(self, run: Callable[[], Any], calls: int = 1) -> Callable[[], float]:
        """Return a function that runs `run`, which makes `calls` calls, and returns the seconds per call.

        On CUDA the time is between events on the device, so it has no launch of the first kernel in it.
        """

        def measured() -> float:
            if not self.is_cuda:
                started = time.perf_counter()
                run()
                return (time.perf_counter() - started) / calls
            self.synchronize()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1000 / calls

        return measured

    def waited(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Return a function that runs `run` and returns the seconds until the device has finished."""

        def measured() -> float:
            self.synchronize()
            started = time.perf_counter()
            run()
            self.synchronize()
            return time.perf_counter() - started

        return measured

    def alternate(self, variants: dict[str, Callable[[], float]], rounds: int) -> Seconds:
        """Return the seconds of each variant in each round, after warm-ups."""
        if self.is_cuda:
            for _ in range(WARM_UPS):
                for variant in variants.values():
                    variant()
        return alternate(dict(variants), rounds)

    def graph_of(self, run: Callable[[], Any]) -> Callable[[], None]:
        """Return a function that replays `run` from a CUDA graph, without Python or launches between kernels.

        Raises:
            RuntimeError: a call cannot be captured.
        """
        side: Any = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    def launches(self, run: Callable[[], Any], calls: int) -> tuple[float, float]:
        """Return the launches and the synchronizations per call of `run`, which makes `calls`.

        Kernels, copies and fills count as launches.
        """
        run()
        if not self.is_cuda:
            with Dispatched() as dispatched:
                run()
            names = dispatched.names
            return len(names) / calls, sum(name in READS for name in names) / calls
        self.synchronize()
        with torch.profiler.profile() as profile:
            run()
            self.synchronize()
        on_device = [
            event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        return len(on_device) / calls, self._synchronizations(run) / calls

    def _synchronizations(self, run: Callable[[], Any]) -> int:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum(SYNCHRONIZES in str(each.message) for each in found)


class Dispatched(TorchDispatchMode):
    """Records the ATen calls that compute something or are read by Python."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))
