"""Exchange of weights between replicas, each trained by a process of its own, through a folder or a bucket.

A replica replaces its own weights and reads the others' when they have changed (`group_files`). It waits for
no other: one that is slow, stopped or dead leaves its weights as they were. Nor does it wait for a bucket:
after the first step, a thread exchanges objects with it while training goes on.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from coursepack.console import inform, warn
from coursepack.distill.exchange.base import (
    Exchange,
    Exchanged,
    ExchangeInputs,
    GroupContext,
    ReplicaContext,
)
from coursepack.distill.exchange.group_files import GroupFiles, weights_key
from coursepack.distill.exchange.stale import Recorded, Stale, StaleConfig, copy_weights, frozen_copy
from coursepack.distill.losses.base import Needs
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from coursepack.models import Network

HEADER_BYTES = 1 << 20
"""Most bytes of a file of weights beyond the weights."""
STEPS = "steps"
"""Key of the number of steps in the metadata of a file."""


@dataclass(frozen=True)
class Transferred:
    """Result of one exchange of files."""

    sent: int
    """Bytes of this replica's weights that were written."""
    received: dict[int, bytes | ValueError]
    """Changed files of other replicas by index, or why one cannot be used."""
    failure: OSError | None
    """Error of the location, if some file could not be read."""


class Replicas(Recorded):
    """Newest known weights of the other replicas, whose logits this one follows.

    They are not part of its state: a replica that is resumed reads the files again.
    """

    def __init__(self, config: StaleConfig, context: ReplicaContext) -> None:
        """Check that the location is empty or belongs to this group.

        Raises:
            RunError: it belongs to another group, or cannot be read.
        """
        super().__init__()
        self.config = config
        self._context = (context,)  # in a tuple, so that its network is not part of this module
        held = context.network.module.state_dict().values()
        self._max_bytes = sum(value.numel() * value.element_size() for value in held) + HEADER_BYTES
        self._files = GroupFiles(context.location, context.identity, context.index, context.count)
        self._others: dict[int, tuple[Network, int]] = {}
        self._has_started = False
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[Transferred] | None = None
        self._failures = 0
        """Number of failed exchanges since the last one that did not fail."""

    def begin_step(self, steps: int) -> None:
        """Exchange files if it is due after a number of steps, or to start.

        Raises:
            RunBusy: another process trains this replica by now.
        """
        starts, is_due = not self._has_started, self.config.is_due(steps)
        if starts:
            self._files.start()
            self._has_started = True
        if self._running is not None and self._running.done():
            self._finish(self._running.result)
            self._running = None
        if is_due or (starts and steps >= self.config.burn_in):
            transfer = partial(self._transfer, self._content(steps) if is_due else None)
            if starts or not self._files.location.is_remote:
                self._finish(transfer)
            else:
                self._begin(transfer)
        self.record.add([steps - theirs for _, theirs in self._others.values()])

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the logits of the replicas whose weights are known."""
        assert inputs.predict is not None
        with torch.no_grad():
            logits = [inputs.predict(self._others[index][0], 0).float() for index in sorted(self._others)]
        return Exchanged((tuple(logits),))

    def _content(self, steps: int) -> bytes:
        """Return a file of this replica's weights, as they are now."""
        (context,) = self._context
        weights = {
            name: value.detach().cpu().contiguous()
            for name, value in context.network.module.state_dict().items()
        }
        return save(weights, metadata={STEPS: str(steps)})

    def _begin(self, transfer: Callable[[], Transferred]) -> None:
        """Exchange files in a thread, unless the exchange before has not ended."""
        if self._running is not None:
            self.record.missed += 1
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="coursepack-exchange")
        self._running = self._thread.submit(transfer)

    def _transfer(self, content: bytes | None) -> Transferred:
        """Write this replica's weights, if there are any to write, and read the others' that have changed."""
        (context,) = self._context
        received: dict[int, bytes | ValueError] = {}
        failure: OSError | None = None
        if content is not None:
            self._files.publish(content)
        for index in range(context.count):
            if index == context.index:
                continue
            found: bytes | ValueError | None = None
            try:
                found = self._files.changed(index, self._max_bytes)
            except OSError as error:
                failure = error
            except ValueError as error:
                found = error
            if found is not None:
                received[index] = found
        return Transferred(len(content or b""), received, failure)

    def _finish(self, transfer: Callable[[], Transferred]) -> None:
        """Use what an exchange of files returns, or count it as missed."""
        try:
            result = transfer()
        except OSError as error:
            result = Transferred(0, {}, error)
        self.record.moved += result.sent
        for index, content in result.received.items():
            self._receive(index, content)
        self._report(result.failure)

    def _report(self, failure: OSError | None) -> None:
        """Count an exchange that failed, and print when the location becomes unreachable or reachable."""
        where = str(self._files.location)
        if failure is not None:
            self.record.missed += 1
            self._failures += 1
            if self._failures == 1:
                warn(
                    f"group {where!r} cannot be reached: {' '.join(str(failure).split())[:300]}. This "
                    "replica goes on with the weights of the others that it has, and tries again at every "
                    "exchange."
                )
        elif self._failures:
            inform(f"group {where!r} is reached again; exchanges that failed: {self._failures}")
            self._failures = 0

    def _receive(self, index: int, content: bytes | ValueError) -> None:
        """Follow new weights of another replica, unless they cannot be used."""
        try:
            if isinstance(content, ValueError):
                raise content
            self._follow(index, content)
        except (ValueError, SafetensorError) as error:
            where = self._files.location.where(weights_key(index))
            warn(
                f"weights of replica {index + 1} are not used, since {where!r} cannot be read: "
                f"{' '.join(str(error).split())[:300]}"
            )

    def _follow(self, index: int, content: bytes) -> None:
        (context,) = self._context
        weights, steps = parse_weights(content)
        check_weights(weights, context.network.module.state_dict())
        network = self._others[index][0] if index in self._others else frozen_copy(context.network)
        copy_weights(weights, network.module)
        self._others[index] = (network, steps)
        self.record.moved += len(content)


def parse_weights(content: bytes) -> tuple[dict[str, Tensor], int]:
    """Return the weights in a file of a replica, and its number of steps.

    Raises:
        SafetensorError, ValueError: the content is damaged.
    """
    weights = load(content)
    length = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + length])
    steps = header.get("__metadata__", {}).get(STEPS, "")
    if not (steps.isascii() and steps.isdigit() and len(steps) < 16):
        raise ValueError(f"its number of steps is {steps!r:.40}")
    return weights, int(steps)


def check_weights(weights: dict[str, Tensor], held: dict[str, Tensor]) -> None:
    """Check that the weights of another replica fit the network, and are finite.

    Raises:
        ValueError: they do not, or are not.
    """
    if odd := sorted(weights.keys() ^ held.keys()):
        raise ValueError(f"{odd[0]!r:.80} is in one network only")
    for name, value in held.items():
        found = weights[name]
        if (found.shape, found.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{name!r:.80} is {found.dtype} {tuple(found.shape)}, expected {value.dtype} "
                f"{tuple(value.shape)}"
            )
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise ValueError(f"{name!r:.80} has values that are not finite")


def _needs(_config: StaleConfig) -> Needs:
    return Needs(one_process="every student is trained by one process")


def _build(config: StaleConfig, context: GroupContext) -> Stale:
    return Stale(config, context.networks)


def _build_replica(config: StaleConfig, context: ReplicaContext) -> Replicas:
    return Replicas(config, context)


EXCHANGE = Exchange(
    config=StaleConfig,
    formula="z_j of a copy of every other student j, which is refreshed every `every` steps",
    source="Anil et al. 2018 (codistillation), arXiv 1804.03235",
    build=_build,
    needs=_needs,
    build_replica=_build_replica,
)
