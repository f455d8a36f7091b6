"""Ranks: processes that train one student together, each on its own share of every batch.

All that knows about torch.distributed is here; for one rank every function is the identity. Gradients are
averaged by one sum over one flat tensor after the last backward pass of a step, and not by
DistributedDataParallel. That gives up sending while the backward pass still runs. What it buys: parameters
that a phase freezes, parts of a batch, and batches that are too short to divide need no special mode; and the
order of the sum is the same in every step, whereas DDP rearranges its buckets after the first, so that a
resumed run of three ranks or more would not end in the same bits.

Started by torchrun, or by whatever else sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Which rank reads which rows is `coursepack.data.batches`' to say.
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

from coursepack.console import say
from coursepack.data.store.owners import Part
from coursepack.device import pick_device
from coursepack.errors import RankLost, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Value = TypeVar("Value")

TIMEOUT = timedelta(minutes=15)
"""For one rank to wait for another: longer than opening sources and checking the first view of large stores,
shorter than a night."""
SILENT_SECONDS = 10.0
"""How long a rank with nothing to add lets another tell an error. torchrun ends all when the first ends."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    index: int = 0
    count: int = 1
    local_count: int = 1
    """How many of them run on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.index == 0

    @property
    def part(self) -> Part | None:
        """Its share of every batch; None means all of it."""
        return None if self.count == 1 else Part(self.index, self.count)

    def say(self, text: str) -> None:
        """Say a line once, whatever the number of ranks."""
        if self.is_first:
            say(text)

    def gathered(self, value: Value) -> list[Value]:
        """Every rank's value, in order; nobody goes on before all have come here."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self._talking():
            dist.all_gather_object(values, value)
        return values

    def first_says(self, flag: bool) -> bool:
        """The first rank's flag. Through the CPU, so that no GPU is waited for."""
        if self.count == 1:
            return flag
        told = torch.tensor([flag], dtype=torch.uint8)
        with self._talking():
            dist.broadcast(told, src=0)
        return bool(told.item())

    def summed(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.count > 1:
            with self._talking():
                dist.all_reduce(values)
        return values

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their mean over the ranks.

        Every rank has to have gradients of the same parameters: each computes the same terms of every step.
        """
        if self.count == 1:
            return
        gradients = [value.grad for value in parameters if value.grad is not None]
        mean = self.summed(torch.cat([gradient.reshape(-1) for gradient in gradients])) / self.count
        for gradient, piece in zip(gradients, _pieces(mean, gradients), strict=True):
            gradient.copy_(piece.view_as(gradient))

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace the values of tensors on one device by the first rank's, bit by bit."""
        if self.count == 1:
            return
        # The widest first, so that each one's bytes begin where its type allows.
        several = sorted((value.detach() for value in tensors), key=lambda value: -value.element_size())
        if not several:
            return
        rows = [value.reshape(-1).view(torch.uint8) for value in several]
        everything = torch.cat(rows)
        with self._talking():
            dist.broadcast(everything, src=0)
        if not self.is_first:
            for value, piece in zip(several, _pieces(everything, rows), strict=True):
                value.copy_(piece.view(value.dtype).view(value.shape))

    def all_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows `(N, ...)` of all ranks from each one's own `(n, ...)`.

        The gradient of the own rows is multiplied by the number of ranks: where each computes the same loss
        of all rows, the mean over ranks of what comes of it is the gradient of that loss.

        Args:
            own: this rank's rows.
            counts: how many rows each rank has; the number of this one's may differ by what is left over.
        """
        if self.count == 1:
            return own
        rows: Tensor = _AllRows.apply(own, self, tuple(counts))
        return rows

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RankLost(
                f"rank {self.index} of {self.count} cannot reach the others ({reason}): one of them has "
                "ended or does not answer. With `torchrun --max-restarts N ... --resume` all begin again "
                "from the last checkpoint."
            ) from error


ALONE = Ranks()


def _pieces(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.split(flat, [value.numel() for value in like])


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, counts: tuple[int, ...]) -> Tensor:
        ctx.start, ctx.count, ctx.ranks = sum(counts[: ranks.index]), len(own), ranks.count
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in counts]
        with ranks._talking():
            dist.all_gather(found, padded)
        return torch.cat([rows[:count] for rows, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.start : ctx.start + ctx.count] * ctx.ranks, None, None


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Be one of the ranks that the environment speaks of, and their device; alone where it speaks of none.

    An error inside the context, on whichever rank it comes first, leaves it on that rank alone. The others
    have nothing to add (they fail the same way, or because that one is gone), and exit with status 1.

    Args:
        device: as `pick_device`; with several ranks `cuda` is one GPU for each.

    Raises:
        RecipeError: no such device, or too few GPUs.
        RankLost: the other ranks do not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, pick_device(device)
        return
    try:
        kept, index, count = next(rendezvous("env://", timeout=TIMEOUT))
        store = _met(kept, index, count)
    except dist.DistError as error:
        raise RankLost(f"the ranks do not find each other: {error}") from error
    try:
        own = _own_device(device)
        backend = "gloo" if own.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=index, world_size=count, timeout=TIMEOUT)
        yield Ranks(index, count, _environment("LOCAL_WORLD_SIZE", 1)), own
    except Exception:
        if not _is_first_to_fail(store):
            time.sleep(SILENT_SECONDS)
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def _met(store: Any, index: int, count: int) -> Any:
    """A corner of the store for the ranks that were started together.

    torchrun keeps one store over all restarts, and in it the addresses of ranks that are gone, which others
    would try to reach. Nothing in the environment names a start: a node that comes in for a lost one counts
    its restarts anew. So every rank says hello by a name that no other ever had, and the first answers all
    hellos, old ones too, until everyone of this start has heard it.
    """
    own = uuid4().hex
    if index > 0:
        store.set(f"hello/{index}", own)
        start = store.get(f"answer/{own}").decode()
        store.set(f"{start}/heard/{index}", "yes")
        return _corner(start, store)
    given_up, others = time.monotonic() + TIMEOUT.total_seconds(), range(1, count)
    while not all(store.check([f"{own}/heard/{rank}"]) for rank in others):
        if time.monotonic() > given_up:
            raise RankLost(f"only some of {count} ranks have come within {TIMEOUT}")
        for rank in others:
            if store.check([f"hello/{rank}"]):
                store.set(f"answer/{store.get(f'hello/{rank}').decode()}", own)
        time.sleep(0.02)
    return _corner(own, store)


def _corner(name: str, store: Any) -> Any:
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined, unused-ignore]  # public, but not in its stubs


def _own_device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cpu":
        return device
    place, there = _environment("LOCAL_RANK", 0), torch.cuda.device_count()
    if device.index is not None or place >= there:
        asked = f"device is {name!r}" if device.index is not None else f"this machine has {there} GPUs"
        raise RecipeError(
            f"{asked}, but {_environment('LOCAL_WORLD_SIZE', 1)} ranks run on it and each takes a GPU of its "
            "own: give --device cuda and as many --nproc-per-node as there are GPUs, or --device cpu"
        )
    own = torch.device("cuda", place)
    torch.cuda.set_device(own)
    return own


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _is_first_to_fail(store: Any) -> bool:
    """Whether no other rank has failed since all were started."""
    try:
        return cast("int", store.add("failed", 1)) == 1
    except RuntimeError:
        return False  # whoever kept the store is gone, and was the first
