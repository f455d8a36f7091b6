"""Moments at which a process dies or waits: chosen beforehand, so that no test depends on how fast it is.

Everything that is kept gets its name by a rename, so renames are what moments are counted by.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path


def at_rename(number, act, name=None):
    """Have `act` called just before the given rename of this process, counted from 1; of files of a name."""
    rename, count, turn = os.replace, 0, threading.Lock()

    def counted(origin, target, **options):
        nonlocal count
        with turn:
            count += name is None or Path(target).name == name
            is_moment = count == number
        if is_moment:
            act()
        rename(origin, target, **options)

    os.replace = counted


def at_batch(number, act, log):
    """Have `act` called in the given batch of the teacher, counted from 1; each adds a byte to a file."""
    from coursepack.models import TeacherRunner

    run = TeacherRunner.run

    def counted(self, pixels):
        with Path(log).open("ab") as file:
            file.write(b".")
        if Path(log).stat().st_size == number:
            act()
        return run(self, pixels)

    TeacherRunner.run = counted


def in_turn(*acts):
    """Do several things, one after another."""
    for act in acts:
        act()


def die():
    """End as by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def hold(marker):
    """Make a file that says so, and wait for a signal."""
    Path(marker).touch()
    while True:
        time.sleep(1)


def with_path(folder):
    """Have Python processes that this one starts find modules in a folder, such as a `sitecustomize`."""
    os.environ["PYTHONPATH"] = str(folder)


def with_variables(variables):
    """Set environment variables, also for processes that this one starts."""
    os.environ.update(variables)


def wait_for(marker, release):
    """Make a file that says so, and wait until another exists; signals are of no use in such a thread."""
    Path(marker).touch()
    while not Path(release).exists():
        time.sleep(0.01)


def stop(marker):
    """Stop once as by `kill -STOP`, and make a file that says so."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGSTOP)
