"""What a run asks of the machine: how many threads, and which of torch's algorithms. Set once, and put back.

A step on a CPU is computed in torch's threads, and the loss's kernels borrow the same ones: one for each core
that this process may use, which is what torch begins with. torchrun asks for one thread per rank instead;
here ranks on one machine share its cores evenly. The number does not depend on how many processes decode
images, because sums in convolutions depend on it, and who renders must not change a student. Where decoding
leaves a step too little of the machine, give fewer --workers.
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
    """Cores that this process may use, its share where several ranks run on one machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Set torch's threads inside the context; None leaves them alone, but for a rank's share of the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or (cores() if "LOCAL_WORLD_SIZE" in os.environ else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def algorithms(*, deterministic: bool) -> Iterator[None]:
    """Have torch use only deterministic algorithms inside the context, or else the fastest."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get(WORKSPACE)
    if deterministic:
        # What cuBLAS asks for, and reads when it is first used.
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
def generators_of(device: torch.device) -> Iterator[None]:
    """Put torch's generators back afterwards: training seeds them before every step."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
