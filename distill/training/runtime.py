"""Process-wide torch settings of a run: threads, deterministic algorithms and random generators.

Each setting is changed by a context manager and restored afterwards. Training on a CPU and the loss kernels
share torch's threads, one per usable core by default. torchrun sets one thread per rank; here the ranks on
one machine share its cores evenly instead. The number of threads does not depend on the number of worker
processes, because results of convolutions depend on it and rendering must not change a student. If decoding
slows training down on a CPU, use fewer --workers.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def cores() -> int:
    """Return the number of cores that this process may use, divided among the ranks of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's threads inside the context.

    None keeps the current number, or under torchrun uses this rank's share of the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or (cores() if "LOCAL_WORLD_SIZE" in os.environ else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def torch_algorithms(*, deterministic: bool) -> Iterator[None]:
    """Select torch's deterministic algorithms, or else its fastest ones, inside the context."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get(WORKSPACE)
    if deterministic:
        # cuBLAS requires this variable for determinism, and reads it on first use.
        os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


@contextmanager
def preserved_generators(device: torch.device) -> Iterator[None]:
    """Restore the state of torch's generators on exit; training reseeds them before every step."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
