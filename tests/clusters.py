"""A Ray cluster of two nodes of this machine, and the folder that governs the networks of its workers."""

import time
from contextlib import contextmanager
from pathlib import Path

import cluster_teacher
import pytest

MEMORY = 80 << 20
WAIT_SECONDS = 300
"""Limit of waits on a machine that is busy with other things; each ends as soon as it can."""
ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parent),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_server_port_wait_time_s": str(WAIT_SECONDS),
    "RAY_worker_register_timeout_seconds": str(WAIT_SECONDS),
    # No worker is killed because other programs use the memory.
    "RAY_memory_monitor_refresh_ms": "0",
    # Dead nodes are noticed sooner; live ones may take as long to answer as before.
    "RAY_health_check_period_ms": "1000",
}
"""Variables of the nodes' processes: workers find the modules of the tests, and may take long to start."""

MARKS = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
"""Marks of tests on a cluster: Ray's modules warn when they are imported, and leave sockets to the garbage
collector."""


def on_cluster(test):
    """Add these marks to a test."""
    for mark in MARKS:
        test = mark(test)
    return test


class OwnCluster:
    """A cluster of two nodes with one CPU each; the first is the head."""

    def __init__(self, folder):
        from ray.cluster_utils import Cluster

        self.folder = folder
        self.cluster = Cluster()
        self.nodes = [self.add(include_dashboard=False), self.add()]

    @property
    def address(self):
        return self.cluster.address

    def add(self, **settings):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            return self.cluster.add_node(num_cpus=1, object_store_memory=MEMORY, **settings)

    def remove(self, node):
        self.cluster.remove_node(node, allow_graceful=False)

    def batches(self):
        """Process of each batch that a `cluster_teacher` ran."""
        return cluster_teacher.batches(self.folder)

    @contextmanager
    def held(self, after):
        """Have all batches after a number of them wait for the end of the context."""
        hold = self.folder / cluster_teacher.HOLD
        hold.write_text(str(after))
        try:
            yield
        finally:
            hold.unlink()

    def calm(self):
        """Have its networks do nothing unusual, and forget their batches."""
        for path in self.folder.iterdir():
            path.unlink()


@contextmanager
def own_cluster(folder):
    """Start a cluster whose networks are governed by a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cluster_teacher.FOLDER, str(folder))
        own = OwnCluster(folder)
        yield own
        own.cluster.shutdown()


def wait_until(condition, ended, seconds=WAIT_SECONDS):
    """Wait for a condition; fail as soon as what should bring it about has ended.

    `ended` returns None until then, and afterwards what is to be shown.
    """
    limit = time.monotonic() + seconds
    while True:
        shown = ended()
        if condition():
            return
        assert shown is None, f"ended too early: {shown}"
        assert time.monotonic() < limit, f"nothing after {seconds} s"
        time.sleep(0.02)
