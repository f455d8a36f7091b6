"""Workers of a Ray cluster: connecting, starting actors, handing out work, and replacing actors that die.

Workers are plain actors with one piece of work at a time each. A piece whose actor dies is returned to the
caller, and a new actor takes the dead one's place, on any node that has room, including nodes that joined
later. Actors are never restarted by Ray, because calls to a restarting actor fail in a loop.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from coursepack.allocator import keep_freed_memory
from coursepack.console import inform
from coursepack.errors import RecipeError, WorkerLost, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Work = TypeVar("Work")

MAX_LOSSES = 3
"""Number of workers that a piece of work may lose before it is given up."""
PATIENCE_SECONDS = 60.0
"""Time without any worker after which a message says what they are waiting for."""
KNOCK_SECONDS = 10.0
"""Time in which a cluster has to accept a connection."""
POLL_SECONDS = 2.0
"""Interval in which nodes that joined are noticed."""
MAX_FAILED_STARTS = 3
"""Number of workers in a row that may die while they start."""


def import_ray(address: str | None) -> Any:
    """Return the module `ray`.

    Raises:
        RecipeError: it is not installed, or the address is one of Ray Client.
    """
    # Nothing is reported to Ray's developers unless the user has chosen so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise RecipeError(
            f"--executor ray needs ray, which cannot be imported: {error}. "
            "Get it with `pip install 'coursepack[cluster]'`"
        ) from error
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None and address.startswith("ray://"):
        raise RecipeError(
            f"--address {address!r} is one of Ray Client, through which files cannot be written: submit "
            "the command to the cluster with `ray job submit`"
        )
    return ray


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine; yields the module `ray`.

    An existing connection of this process is used and kept.

    Raises:
        WorkerLost: the cluster cannot be reached.
    """
    ray = import_ray(address)
    if ray.is_initialized():
        yield ray
        return
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = address or os.environ.get("RAY_ADDRESS")
        raise WorkerLost(
            f"cannot connect to {'Ray on this machine' if where is None else f'a Ray cluster at {where!r}'}: "
            f"{first_line(error)}. Check --address with `ray status`, or start a node with `ray start`"
        ) from error
    try:
        if in_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)  # ray.init replaces it
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Open a connection to an address HOST:PORT, because Ray itself tries a wrong one for minutes.

    Raises:
        OSError: nothing answers there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def uses_gpus(device: str, flag: str, share: float | None, resources: dict[str, float]) -> bool:
    """Return whether each worker takes a GPU or a share of one.

    Args:
        device: name of the device.
        flag: option that sets the share of a GPU.
        share: value of that option, None if it is not given.
        resources: resources of the cluster.

    Raises:
        RecipeError: the device and the share contradict each other, or one GPU is named.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {device} names one GPU, but Ray assigns them: give --device cuda")
    if device == "cpu" and share is not None:
        raise RecipeError(f"{flag} is given with --device cpu: leave one of them out")
    return device == "cuda" or (device == "auto" and (share is not None or resources.get("GPU", 0) > 0))


def enter(folder: str, sharing: int) -> str:
    """Prepare the process of a worker, and return its host and process id as text.

    Args:
        folder: working directory of the driver, which relative paths refer to; ignored if it does not exist
            here.
        sharing: number of workers that share the cores of this machine.
    """
    if Path(folder).is_dir():
        os.chdir(folder)
    # The renderer divides the cores by it, as it does among the ranks of torchrun.
    os.environ["LOCAL_WORLD_SIZE"] = str(sharing)
    keep_freed_memory()
    return f"{socket.gethostname()}, process {os.getpid()}"


@dataclass(frozen=True)
class Share:
    """Resources of a worker."""

    cpus: float = 1
    gpus: float = 0

    def fits(self, resources: dict[str, float]) -> int:
        """Return the number of workers that a node has room for: by its GPUs, or without them its CPUs."""
        key, each = ("GPU", self.gpus) if self.gpus else ("CPU", self.cpus)
        return math.floor(resources.get(key, 0) / each + 1e-9)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


@dataclass(frozen=True)
class Ended(Generic[Work]):
    """A piece of work that is finished or lost."""

    work: Work
    result: Any = None
    loss: str | None = None
    """Reason for which its worker was lost; None if the work is finished."""


class Pool(Generic[Work]):
    """The actors of a run: starting, idle or busy."""

    def __init__(
        self,
        ray: Any,
        worker: type,
        share: Share,
        count: int | None,
        *,
        start: Callable[[int], tuple[Any, ...]],
        welcome: Callable[[Any], None],
    ) -> None:
        """Initialize a pool; `wait` creates its actors.

        Args:
            ray: the module `ray`, connected to a cluster.
            worker: class of the actors. Its method `start` is called first.
            share: resources of an actor.
            count: number of actors. Defaults to as many as the nodes have room for.
            start: function that returns the arguments of `start`, given the number of actors that share a
                node.
            welcome: function that is called with the result of `start`, and raises an error if an actor does
                not fit.
        """
        self._ray, self._worker, self._share, self._count = ray, worker, share, count
        self._start, self._welcome_report = start, welcome
        self._starting: dict[Any, Any] = {}
        """Actors that are starting, by the reference of the result of `start`."""
        self._busy: dict[Any, tuple[Any, Work]] = {}
        """Actors and their work by the reference of the result."""
        self._idle: list[Any] = []
        self._failed_starts = 0
        self._target, self._next_poll = 0, 0.0
        self._lonely_since: float | None = time.monotonic()
        """Time since which there is no worker, until there is one or a message has said so."""

    @property
    def has_idle(self) -> bool:
        """True if an actor waits for work."""
        return bool(self._idle)

    @property
    def is_busy(self) -> bool:
        """True if an actor has work."""
        return bool(self._busy)

    @property
    def is_starting(self) -> bool:
        """True if an actor is starting."""
        return bool(self._starting)

    def describe(self) -> str:
        """Return the number of actors that have started as text."""
        count = len(self._idle) + len(self._busy)
        return f"{count} worker{'s' if count != 1 else ''}"

    def hand_out(self, work: Work, method: str, *arguments: Any) -> None:
        """Call a method of an idle actor, which does a piece of work."""
        actor = self._idle.pop()
        self._busy[getattr(actor, method).remote(*arguments)] = actor, work

    def wait(self, waiting: int | None = None) -> list[Ended[Work]]:
        """Wait for the next events, at most `POLL_SECONDS`, and create missing actors.

        Args:
            waiting: number of pieces that are not handed out yet, beyond which no actor is needed; None if it
                is not known.

        Returns:
            The pieces of work that were finished or lost.

        Raises:
            WorkerLost: workers cannot start.
            Exception: an error that a worker raised, or of the function `welcome`.
        """
        self._grow(math.inf if waiting is None else waiting + len(self._busy))
        if self._lonely_since is not None and time.monotonic() > self._lonely_since + PATIENCE_SECONDS:
            self._lonely_since = None
            inform(f"no worker has started yet: {self._needs()}")
        references = [*self._starting, *self._busy]
        if not references:
            time.sleep(POLL_SECONDS)
            return []
        self._ray.wait(references, num_returns=1, timeout=POLL_SECONDS)
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        ended = []
        for reference in ready:
            if reference in self._starting:
                self._welcome(reference)
            else:
                ended.append(self._collect(reference))
        return ended

    def dismiss(self) -> None:
        """End all actors."""
        for actor in (*self._starting.values(), *self._idle, *(actor for actor, _ in self._busy.values())):
            with suppress(self._ray.exceptions.RayError):  # the cluster may be gone
                self._ray.kill(actor)
        self._starting, self._busy, self._idle = {}, {}, []

    def _grow(self, most: float) -> None:
        """Create actors up to the number that was asked for, or that the nodes have room for."""
        if (now := time.monotonic()) >= self._next_poll:
            # At least one is asked for, so that a cluster that grows on demand sees it.
            room = sum(map(self._share.fits, self._nodes()))
            self._target, self._next_poll = self._count or max(1, room), now + POLL_SECONDS
        while len(self._starting) + len(self._busy) + len(self._idle) < min(self._target, most):
            options: dict[str, float] = {"num_cpus": self._share.cpus, "num_gpus": self._share.gpus}
            actor = self._ray.remote(**options, max_restarts=0, max_task_retries=0)(self._worker).remote()
            report = actor.start.remote(*self._start(self._sharing()))
            self._starting[report] = actor

    def _nodes(self) -> list[dict[str, float]]:
        """Return the resources of every node."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _sharing(self) -> int:
        """Return the largest number of actors that share a node."""
        most = max(map(self._share.fits, self._nodes()), default=1)
        return max(1, most if self._count is None else min(most, self._count))

    def _needs(self) -> str:
        found = self._ray.cluster_resources()
        return (
            f"each needs {self._share}, and the cluster has {found.get('CPU', 0):g} CPUs and "
            f"{found.get('GPU', 0):g} GPUs, which others may be using (`ray status`)"
        )

    def _welcome(self, reference: Any) -> None:
        """Count an actor that has started as idle, if it fits."""
        actor = self._starting.pop(reference)
        try:
            report = self._result(reference)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise WorkerLost(
                    f"{MAX_FAILED_STARTS} workers in a row ended while they started, the last one because: "
                    f"{_reason(error)}. All nodes need the same Python environment and enough memory for "
                    "every worker; Ray's logs on the nodes say more"
                ) from error
            return
        self._failed_starts, self._lonely_since = 0, None
        self._idle.append(actor)
        self._welcome_report(report)

    def _collect(self, reference: Any) -> Ended[Work]:
        actor, work = self._busy.pop(reference)
        try:
            result = self._result(reference)
        except self._ray.exceptions.RayError as error:
            # An actor that is only out of reach may still be computing.
            self._ray.kill(actor)
            return Ended(work, loss=_reason(error))
        self._idle.append(actor)
        return Ended(work, result)

    def _result(self, reference: Any) -> Any:
        """Return a worker's result, or raise the error that it raised itself."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _reason(error: Exception) -> str:
    """Return the last informative line of an error of Ray, without its end and its general advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
    return text[:400].rstrip(". ")
