"""Executor that trains students on the workers of a Ray cluster.

A worker trains one group of students at a time, in the folders in which this process would train them, so
they are on a file system that all nodes share. A group whose worker dies is continued from its checkpoint by
another.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.canonical import difference_table
from coursepack.console import inform, progress, warn
from coursepack.data.store.cache import LIMIT_VARIABLE
from coursepack.device import pick_device
from coursepack.distill.distributed import Ranks
from coursepack.distill.runs.sweep import groups_of, train_group, unfinished
from coursepack.distill.setup.prepare import library_versions
from coursepack.errors import RunBusy, StudentsLost, WorkerLost, WorkerMismatch
from coursepack.files import write_whole
from coursepack.ray_workers import MAX_LOSSES, Pool, Share, connected, enter, import_ray, uses_gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coursepack.distill.runs.sweep import Student, SweepOptions

    Group = Sequence[Student]

LOCK_SECONDS = 60.0
"""Time in which a worker that was killed, or whose driver was, gives up the lock of its run."""
WITNESS = ".witness"
"""File that the driver puts into the folder of the runs, to be found by workers that share it."""


@dataclass(frozen=True)
class Report:
    """Result of `Worker.start`."""

    name: str
    """Host and process id."""
    sees_folder: bool = True
    """True if the worker has found the driver's file in the folder of the runs."""
    versions: dict[str, str] = field(default_factory=library_versions)


class Worker:
    """Trains groups of students in a process of a cluster."""

    def start(
        self, folder: str, out: str, witness: bytes, device: str, cache_bytes: str | None, sharing: int
    ) -> Report:
        """Prepare the process.

        Args:
            folder: working directory of the driver, as for `enter`.
            out: folder of the runs' folders.
            witness: content of the driver's file there.
            device: name of the device to train on.
            cache_bytes: limit of the cache of stores in buckets; None is that of this machine.
            sharing: number of workers that share the cores and the memory of this machine.
        """
        name = enter(folder, sharing)
        if cache_bytes is not None:
            os.environ[LIMIT_VARIABLE] = cache_bytes
        self._out, self._device = Path(out), device
        self._ranks = Ranks(local_count=sharing)
        try:
            seen = (self._out / WITNESS).read_bytes() == witness
        except OSError:
            seen = False
        return Report(name, seen)

    def train(self, group: Group, how: SweepOptions) -> tuple[dict[str, str], list[list[Student]]]:
        """Train those students of a group that are not finished, as `train_group`."""
        end = time.monotonic() + LOCK_SECONDS
        while left := unfinished(group, self._out):
            try:
                return train_group(left, self._out, pick_device(self._device), how, self._ranks)
            except RunBusy:
                if time.monotonic() > end:
                    raise
                time.sleep(1)
        return {}, []


class RayExecutor:
    """Executor that trains groups of students on the workers of a Ray cluster."""

    def __init__(
        self, address: str | None = None, gpus_per_run: float | None = None, cpus_per_run: int | None = None
    ) -> None:
        """Initialize an executor; nothing is connected yet.

        Args:
            address: address of the cluster, or `auto` for the one that this machine belongs to. Defaults to
                the environment variable RAY_ADDRESS, and without it to a cluster of this machine alone.
            gpus_per_run: share of a GPU, or number of GPUs, that a group of students takes. Defaults to 1 on
                a cluster with GPUs.
            cpus_per_run: number of CPUs that a group takes, and of its threads. Defaults to 1.

        Raises:
            RecipeError: ray is not installed, or the address is one of Ray Client.
        """
        import_ray(address)
        self._address, self._gpus, self._cpus = address, gpus_per_run, cpus_per_run or 1
        self.address: str
        """Address of the cluster, inside the context `connected`."""

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect to the cluster; inside the context, `train` uses the connection, and `address` is known.

        Raises:
            WorkerLost: the cluster cannot be reached.
        """
        with connected(self._address) as ray:
            self.address = str(ray.get_runtime_context().gcs_address)
            yield

    def train(
        self, groups: Sequence[Group], out: Path, how: SweepOptions, describe: Callable[[Group], str]
    ) -> dict[str, str]:
        """Train groups on as many workers as the cluster has room for.

        Raises:
            RecipeError: the device and the share of a GPU contradict each other.
            StudentsLost: students have lost `MAX_LOSSES` workers each, and all others are finished or have
                diverged.
            WorkerLost: workers cannot start, or do not share the folder of the runs.
            WorkerMismatch: a worker has other versions of the libraries than this process.
            CoursepackError: a worker's error that is not its loss.
        """
        if not groups:
            return {}
        with connected(self._address) as ray, _witness(out) as witness:
            pool = self._open_pool(ray, out, how, witness)
            runs = _Runs(groups, out, replace(how, threads=how.threads or self._cpus))
            total = sum(map(len, groups))
            try:
                with progress("train", total, "students") as meter:
                    while runs.waiting or pool.is_busy:
                        while runs.waiting and pool.has_idle:
                            group = runs.waiting.popleft()
                            inform(describe(group))
                            pool.hand_out(group, "train", group, runs.how)
                        for ended in pool.wait(len(runs.waiting)):
                            before = runs.left
                            if ended.loss is None:
                                runs.finish(ended.work, *ended.result)
                            else:
                                runs.put_back(ended.work, ended.loss)
                            if runs.left < before:
                                meter.advance(before - runs.left, pool.describe())
            finally:
                pool.dismiss()
        runs.check()
        return runs.diverged

    def _open_pool(self, ray: Any, out: Path, how: SweepOptions, witness: bytes) -> Pool[Group]:
        gpus = uses_gpus(how.device, "--gpus-per-run", self._gpus, ray.cluster_resources())
        device = "cuda" if gpus else "cpu"
        share, limit = Share(self._cpus, (self._gpus or 1.0) if gpus else 0), os.environ.get(LIMIT_VARIABLE)
        return Pool(
            ray,
            Worker,
            share,
            None,
            start=lambda sharing: (str(Path.cwd()), str(out), witness, device, limit, sharing),
            welcome=lambda report: _check_report(report, out),
        )


class _Runs:
    """Groups that are still to be trained, and students that never will be."""

    def __init__(self, groups: Sequence[Group], out: Path, how: SweepOptions) -> None:
        self._out, self.how = out, how
        self.waiting = deque(groups)
        self.diverged: dict[str, str] = {}
        """Error messages of students that diverged, by name."""
        self.left = sum(map(len, groups))
        """Number of students that are not finished, and have not been given up."""
        self._losses: Counter[str] = Counter()
        self._given_up: dict[str, str] = {}

    def finish(self, group: Group, failures: dict[str, str], alone: Sequence[Group]) -> None:
        """Count a group as trained, except for the students that are to be trained alone."""
        for name, reason in failures.items():
            warn(f"{name}: {reason}")
        self.diverged |= failures
        self.waiting.extendleft(reversed(alone))
        self.left -= len(group) - sum(map(len, alone))

    def put_back(self, group: Group, loss: str) -> None:
        """Queue the unfinished students of a group whose worker was lost, but for those given up."""
        left = unfinished(group, self._out)
        self._losses.update(student.name for student in left)
        again = [student for student in left if self._losses[student.name] < MAX_LOSSES]
        for student in left:
            if student not in again:
                self._given_up[student.name] = loss
        if again:
            names = ", ".join(student.name for student in again)
            inform(f"{names}: lost with a worker, which ended because: {loss}. Another continues")
        # It is unknown which student of a group has ended its worker: each has its last try alone.
        is_last = any(self._losses[student.name] == MAX_LOSSES - 1 for student in again)
        together = 1 if is_last else self.how.together
        self.waiting.extendleft(reversed(groups_of(again, self._out, together)))
        self.left -= len(group) - len(again)

    def check(self) -> None:
        """Check that no student was given up.

        Raises:
            StudentsLost: there are some; the message names them.
        """
        if self._given_up:
            reasons = "".join(f"\n  {name}: {loss}" for name, loss in sorted(self._given_up.items()))
            diverged = f"\nDiverged: {', '.join(self.diverged)}." if self.diverged else ""
            raise StudentsLost(
                f"not trained, because each has lost {MAX_LOSSES} workers, the last one because:{reasons}"
                f"{diverged}\nAll others are finished. If the nodes are short of memory, give more "
                "--cpus-per-run or --gpus-per-run, so that fewer runs share them; then run the same command "
                "again (a sweep with --resume)"
            )


@contextmanager
def _witness(out: Path) -> Iterator[bytes]:
    """Put a file of random content into a folder; yields the content."""
    content = secrets.token_hex(16).encode()
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / WITNESS, content)
    try:
        yield content
    finally:
        (out / WITNESS).unlink(missing_ok=True)


def _check_report(report: Report, out: Path) -> None:
    """Check that a worker has the folder of the runs, and the libraries of this process."""
    if not report.sees_folder:
        raise WorkerLost(
            f"the worker on {report.name}, does not find the folder {str(out)!r} of "
            f"{socket.gethostname()}: give an --out on a file system that all nodes share"
        )
    if table := difference_table(library_versions(), report.versions, "this process", "worker"):
        raise WorkerMismatch(
            f"the worker on {report.name}, has other versions of libraries.\n{table}\n"
            "All nodes need the same environment."
        )
