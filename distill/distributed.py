"""Distributed training: processes (ranks) that train one student together, each on a share of every batch.

This is the only module that uses torch.distributed; with one rank every function is the identity. Gradients
are averaged by a single all-reduce of one flat tensor after the last backward pass of a step, not by
DistributedDataParallel (DDP). Communication therefore does not overlap with the backward pass. In return,
frozen parameters, gradient accumulation and batches that are too small to divide need no special mode, and
the order of summation is the same in every step. DDP rebuilds its buckets after the first step, so a resumed
run of three or more ranks would not reproduce the bits of an uninterrupted one.

torchrun, or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, starts the processes. `coursepack.data.batches` decides which rank reads which rows.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from coursepack.console import inform, warn
from coursepack.data.store.owners import Part
from coursepack.device import pick_device, rank_device
from coursepack.errors import RankLost

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Value = TypeVar("Value")

TIMEOUT = timedelta(minutes=15)
"""Timeout of collective operations. Opening sources and checking the first view of large stores take less."""
EXIT_DELAY_SECONDS = 10.0
"""Delay before a rank exits after another rank has failed, so that the other can print its error: torchrun
ends all ranks when the first one exits."""


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, and the collective operations of its process group."""

    index: int = 0
    count: int = 1
    local_count: int = 1
    """Number of ranks on this machine."""

    @property
    def is_first(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.index == 0

    @property
    def part(self) -> Part | None:
        """This rank's share of every batch; None means the whole batch."""
        return None if self.count == 1 else Part(self.index, self.count)

    def log_once(self, text: str) -> None:
        """Log a line on the first rank only."""
        if self.is_first:
            inform(text)

    def warn_once(self, text: str) -> None:
        """Print a warning on the first rank only."""
        if self.is_first:
            warn(text)

    def all_gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in rank order. Blocks until every rank has called it."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self._rank_lost_on_error():
            dist.all_gather_object(values, value)
        return values

    def broadcast_flag(self, flag: bool) -> bool:
        """Return the first rank's flag on every rank. Uses a CPU tensor, so it does not synchronize a GPU."""
        if self.count == 1:
            return flag
        value = torch.tensor([flag], dtype=torch.uint8)
        with self._rank_lost_on_error():
            dist.broadcast(value, src=0)
        return bool(value.item())

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place, and return it."""
        if self.count > 1:
            with self._rank_lost_on_error():
                dist.all_reduce(values)
        return values

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their mean over all ranks.

        All ranks must have gradients for the same parameters, which holds because every rank computes the
        same terms in every step.
        """
        if self.count == 1:
            return
        gradients = [value.grad for value in parameters if value.grad is not None]
        if not gradients:
            return
        mean = self.all_reduce_sum(torch.cat([gradient.reshape(-1) for gradient in gradients])) / self.count
        for gradient, piece in zip(gradients, _pieces(mean, gradients), strict=True):
            gradient.copy_(piece.view_as(gradient))

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first rank's values into the tensors of all ranks. All tensors must be on one device."""
        if self.count == 1:
            return
        # Widest element type first, so that every tensor's bytes are aligned for its type.
        several = sorted((value.detach() for value in tensors), key=lambda value: -value.element_size())
        if not several:
            return
        rows = [value.reshape(-1).view(torch.uint8) for value in several]
        everything = torch.cat(rows)
        with self._rank_lost_on_error():
            dist.broadcast(everything, src=0)
        if not self.is_first:
            for value, piece in zip(several, _pieces(everything, rows), strict=True):
                value.copy_(piece.view(value.dtype).view(value.shape))

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate the rows of all ranks, `(n, ...)` each, to `(N, ...)`.

        Differentiable. The gradient of this rank's rows is multiplied by the number of ranks: if every rank
        computes the same loss over all rows, averaging gradients over ranks yields the gradient of that loss.

        Args:
            own: this rank's rows.
            counts: number of rows of each rank.
        """
        if self.count == 1:
            return own
        rows: Tensor = _GatherRows.apply(own, self, tuple(counts))
        return rows

    @contextmanager
    def _rank_lost_on_error(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RankLost(
                f"rank {self.index} of {self.count} cannot reach the others ({reason}): one of them has "
                "exited or does not respond. With `torchrun --max-restarts N ... --resume` all ranks restart "
                "from the last checkpoint."
            ) from error


SINGLE_RANK = Ranks()


def _pieces(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.split(flat, [value.numel() for value in like])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, counts: tuple[int, ...]) -> Tensor:
        ctx.start, ctx.count, ctx.ranks = sum(counts[: ranks.index]), len(own), ranks.count
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        all_rows = [torch.empty_like(padded) for _ in counts]
        with ranks._rank_lost_on_error():
            dist.all_gather(all_rows, padded)
        return torch.cat([rows[:count] for rows, count in zip(all_rows, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.start : ctx.start + ctx.count] * ctx.ranks, None, None


@contextmanager
def process_group(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the process group that torchrun's environment describes; without one, run as a single process.

    An exception inside the context propagates only on the rank that fails first. The other ranks fail for the
    same reason, or because that rank is gone; they exit with status 1 and print nothing.

    Args:
        device: device name for `pick_device`; with several ranks, `cuda` means one GPU per rank.

    Yields:
        The rank of this process, and its device.

    Raises:
        RecipeError: the device does not exist, or there are fewer GPUs than ranks.
        RankLost: the other ranks do not connect.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_RANK, pick_device(device)
        return
    try:
        shared, index, count = next(rendezvous("env://", timeout=TIMEOUT))
        store = _start_store(shared, index, count)
    except dist.DistError as error:
        raise RankLost(f"the ranks cannot connect to each other: {error}") from error
    try:
        own = _own_device(device)
        backend = "gloo" if own.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=index, world_size=count, timeout=TIMEOUT)
        yield Ranks(index, count, _environment("LOCAL_WORLD_SIZE", 1)), own
    except Exception:
        if not _is_first_to_fail(store):
            time.sleep(EXIT_DELAY_SECONDS)
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def _start_store(store: Any, index: int, count: int) -> Any:
    """Return a store whose keys are private to the ranks that were started together.

    torchrun keeps one store across restarts. It still holds the addresses of ranks that have exited, and new
    ranks would try to connect to them. No environment variable identifies a start, since the restart count of
    a replacement node begins at zero. So the first rank draws a unique prefix and the ranks agree on it: each
    of the others publishes a unique name under `hello/RANK`, and the first rank writes the prefix under
    `answer/NAME` for every name it finds, including names of earlier starts, until all ranks of this start
    have confirmed the prefix.
    """
    own = uuid4().hex
    if index > 0:
        store.set(f"hello/{index}", own)
        start = store.get(f"answer/{own}").decode()
        store.set(f"{start}/heard/{index}", "yes")
        return _prefixed(start, store)
    given_up, others = time.monotonic() + TIMEOUT.total_seconds(), range(1, count)
    while not all(store.check([f"{own}/heard/{rank}"]) for rank in others):
        if time.monotonic() > given_up:
            raise RankLost(f"only some of the {count} ranks connected within {TIMEOUT}")
        for rank in others:
            if store.check([f"hello/{rank}"]):
                store.set(f"answer/{store.get(f'hello/{rank}').decode()}", own)
        time.sleep(0.02)
    return _prefixed(own, store)


def _prefixed(name: str, store: Any) -> Any:
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined, unused-ignore]  # public, but not in its stubs


def _own_device(name: str) -> torch.device:
    own = rank_device(name)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    return own


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _is_first_to_fail(store: Any) -> bool:
    """Return true if no other rank has failed since the start."""
    try:
        return cast("int", store.add("failed", 1)) == 1
    except RuntimeError:
        return False  # the process that hosted the store has exited, so it failed first
