"""A Ray cluster of several nodes of this machine, and the folder that governs the networks of its workers."""

import time
from contextlib import contextmanager
from pathlib import Path

import cluster_teacher
import pytest

MEMORY = 80 << 20

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
    """A cluster of two nodes with one CPU each."""

    def __init__(self, folder):
        from ray.cluster_utils import Cluster

        self.folder = folder
        head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(2)]

    @property
    def address(self):
        return self.cluster.address

    def add(self, **settings):
        return self.cluster.add_node(num_cpus=1, object_store_memory=MEMORY, **settings)

    def remove(self, node):
        self.cluster.remove_node(node, allow_graceful=False)

    def batches(self):
        """Process of each batch that a `cluster_teacher` ran."""
        log = self.folder / "log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    def calm(self):
        """Have its networks do nothing unusual, and forget their batches."""
        for path in self.folder.iterdir():
            path.unlink()


@contextmanager
def own_cluster(folder):
    """Start a cluster, whose workers find the modules of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cluster_teacher.FOLDER, str(folder))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        own = OwnCluster(folder)
        yield own
        own.cluster.shutdown()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
