"""Actors of a Ray cluster that write blocks: starting, comparing, handing out and replacing."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.canonical import difference_table
from coursepack.console import say
from coursepack.errors import RecipeError, WorkerLost, WorkerMismatch
from coursepack.precompute.executors.worker import Worker
from coursepack.precompute.numerics import NUMERICS, numeric_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coursepack.data.store import Block
    from coursepack.precompute.executors.worker import Report, Witness
    from coursepack.precompute.job import Job

GRACE_SECONDS = 30.0
"""Time that the first started worker waits for the others before the first block."""
PATIENCE_SECONDS = 60.0
"""Time without any worker after which a message says what they are waiting for."""
KNOCK_SECONDS = 10.0
"""Time in which a cluster has to accept a connection."""
POLL_SECONDS = 2.0
"""Interval in which nodes that joined are noticed."""
MOST_FAILED_STARTS = 3
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
            f"--address {address!r} is one of Ray Client, through which a store cannot be written: submit "
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
            f"{_first_line(error)} Check --address with `ray status`, or start a node with `ray start`"
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


class Actors:
    """The actors of a run: starting, idle or busy."""

    def __init__(self, ray: Any, job: Job, count: int | None, per_gpu: int | None) -> None:
        assert job.spec is not None, "the job has no spec to be recreated from"
        self._ray, self._count = ray, count
        self._gpus = uses_gpus(job.spec.device, per_gpu, ray.cluster_resources())
        self._per_gpu = per_gpu or 1
        self._spec = replace(job.spec, device="cuda" if self._gpus else "cpu")
        self._identity = job.plan().identity
        self._first: Report | None = None
        """Report of the worker with which the others are compared."""
        self._starting: dict[Any, Any] = {}
        """Actors that are starting, by the reference of their report."""
        self._busy: dict[Any, tuple[Any, list[Block]]] = {}
        """Actors and their groups by the reference of the result."""
        self._idle: list[Any] = []
        self._failed_starts = 0
        self._target, self._next_poll = 0, 0.0

    @property
    def has_idle(self) -> bool:
        """True if an actor waits for a group."""
        return bool(self._idle)

    @property
    def is_busy(self) -> bool:
        """True if an actor has a group."""
        return bool(self._busy)

    def describe(self) -> str:
        """Return the number of actors that have started as text."""
        count = len(self._idle) + len(self._busy)
        return f"{count} worker{'s' if count != 1 else ''}"

    def assemble(self) -> dict[str, Any]:
        """Wait until workers have started, and return their environment.

        Returns when all have started, or `GRACE_SECONDS` after the first.

        Raises:
            WorkerLost: workers cannot start.
            WorkerMismatch: two workers, or a worker and this process, do not fit.
        """
        began, first, has_said = time.monotonic(), math.inf, False
        while True:
            self.wait()
            now = time.monotonic()
            if self._first is not None:
                first = min(first, now)
                if not self._starting or now > first + GRACE_SECONDS:
                    return self._first.environment
            elif now > began + PATIENCE_SECONDS and not has_said:
                has_said = True
                say(f"no worker has started yet: {self._needs()}")

    def hand_out(self, group: list[Block], witness: Witness) -> None:
        """Give a group to an idle actor; `witness` is as for `Worker.write`."""
        actor = self._idle.pop()
        self._busy[actor.write.remote(group, witness)] = actor, group

    def wait(self) -> list[tuple[list[Block], str | None]]:
        """Wait for the next events, at most `POLL_SECONDS`, and create missing actors.

        Returns:
            The groups that were finished, each with None, or lost, each with the reason.

        Raises:
            WorkerLost: workers cannot start.
            WorkerMismatch: a worker that has started does not fit.
            Exception: an error that a worker raised.
        """
        self._grow()
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

    def _grow(self) -> None:
        """Create actors up to the number that was asked for, or that the nodes have room for."""
        if (now := time.monotonic()) >= self._next_poll:
            self._target, self._next_poll = self._count or self._room(), now + POLL_SECONDS
        while len(self._starting) + len(self._busy) + len(self._idle) < self._target:
            options: dict[str, float] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
            if self._gpus:
                options["num_gpus"] = 1 if self._per_gpu == 1 else math.floor(1e4 / self._per_gpu) / 1e4
            actor = self._ray.remote(**options)(Worker).remote()
            report = actor.start.remote(self._spec, str(Path.cwd()), self._sharing())
            self._starting[report] = actor

    def _room(self) -> int:
        """Return the number of workers that all nodes together have room for."""
        found = self._ray.cluster_resources()
        return int(found.get("GPU", 0)) * self._per_gpu if self._gpus else int(found.get("CPU", 0))

    def _sharing(self) -> int:
        """Return the largest number of workers that share a node."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        key, each = ("GPU", self._per_gpu) if self._gpus else ("CPU", 1)
        most = max((int(node.get(key, 0)) * each for node in nodes), default=1)
        return max(1, most if self._count is None else min(most, self._count))

    def _needs(self) -> str:
        found = self._ray.cluster_resources()
        each = f"1 CPU and 1/{self._per_gpu} GPU" if self._gpus else "1 CPU"
        return (
            f"each needs {each}, and the cluster has {found.get('CPU', 0):g} CPUs and "
            f"{found.get('GPU', 0):g} GPUs, which others may be using (`ray status`)"
        )

    def _welcome(self, reference: Any) -> None:
        """Compare a worker that has started, and count it as idle."""
        actor = self._starting.pop(reference)
        try:
            report = self._result(reference)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            self._failed_starts += 1
            if self._failed_starts >= MOST_FAILED_STARTS:
                raise WorkerLost(
                    f"{MOST_FAILED_STARTS} workers in a row ended while they started, the last one because: "
                    f"{_reason(error)}. All nodes need the same Python environment and enough memory for a "
                    "teacher per worker; Ray's logs on the nodes say more"
                ) from error
            return
        self._failed_starts = 0
        self._idle.append(actor)
        check_report(report, self._identity, self._first)
        self._first = self._first or report

    def _collect(self, reference: Any) -> tuple[list[Block], str | None]:
        actor, group = self._busy.pop(reference)
        try:
            self._result(reference)
        except self._ray.exceptions.RayError as error:
            # An actor that is only out of reach may still be computing.
            self._ray.kill(actor)
            return group, _reason(error)
        self._idle.append(actor)
        return group, None

    def _result(self, reference: Any) -> Any:
        """Return a worker's result, or raise the error that it raised itself."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None


def check_report(report: Report, identity: dict[str, Any], first: Report | None) -> None:
    """Check that a worker would write the same bytes as the others.

    Args:
        report: report of the worker.
        identity: identity of the store in the driver.
        first: report of the first worker, or None for that one itself.

    Raises:
        WorkerLost: the worker could not open the job.
        WorkerMismatch: teacher, source or view differ from the driver's, or numerics from the first worker's.
    """
    if report.error is not None:
        raise WorkerLost(f"the worker on {report.name}, cannot start: {report.error}")
    if table := difference_table(identity, report.identity, "this process", "worker"):
        raise WorkerMismatch(
            f"the worker on {report.name}, would write another store than this process.\n{table}\n"
            "All nodes need the same files and versions of libraries."
        )
    if first is not None and report.environment[NUMERICS] != first.environment[NUMERICS]:
        own, others = (numeric_entries(each.environment) for each in (report, first))
        table = difference_table(others, own, "first", "this one")
        raise WorkerMismatch(
            f"the worker on {report.name}, has other numerics than the first, on {first.name}: the last bits "
            f"of its rows would differ.\n{table}\nRun on nodes of one kind."
        )


def uses_gpus(device: str, per_gpu: int | None, resources: dict[str, float]) -> bool:
    """Return whether each worker takes a GPU or a share of one.

    Raises:
        RecipeError: the device and the number of workers per GPU contradict each other, or one GPU is named.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {device} names one GPU, but Ray assigns them: give --device cuda")
    if device == "cpu" and per_gpu is not None:
        raise RecipeError("--workers-per-gpu is given with --device cpu: leave one of them out")
    return device == "cuda" or (device == "auto" and (per_gpu is not None or resources.get("GPU", 0) > 0))


def _reason(error: Exception) -> str:
    """Return the last informative line of an error of Ray, without its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:400].rstrip(". ") if lines else type(error).__name__


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}." if lines else f"{type(error).__name__}."
