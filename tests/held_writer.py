"""`precompute`, which ends the twentieth batch of its task's first start after a SIGTERM; Slurm starts it."""

import os
import signal
import threading
import time
from pathlib import Path

from moments import at_batch

from coursepack.precompute.cli import main

install, stopped = signal.signal, threading.Event()


def watched(number, handler):
    """Install a handler that also sets the event."""

    def noted(*arguments):
        stopped.set()
        return handler(*arguments)

    return install(number, noted if callable(handler) else handler)


def hold(marker):
    """Make a file that says so, and go on well after the signal: a process that is killed does not."""
    Path(marker).touch()
    stopped.wait()
    time.sleep(0.5)


if "SLURM_RESTART_COUNT" not in os.environ:
    task = os.environ["SLURM_ARRAY_TASK_ID"]
    signal.signal = watched
    at_batch(20, lambda: hold(f"begun-{task}"), f"batches-{task}")
main()
