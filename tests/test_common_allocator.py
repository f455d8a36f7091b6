"""Freed memory is kept by the process, so that a step does not wait for pages that the last one had."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from coursepack.allocator import keep_freed_memory

made = keep_freed_memory() if sys.argv[1] == "keep" else None
def step():
    several = [np.empty(12 << 20, np.uint8) for _ in range(4)]
    for each in several:
        each[::4096] = 1
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    step()
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
print(made, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def told(mode, **variables):
    """Result of the call, and the page faults of four steps of 48 MB each, two of them in threads."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env=environment | variables, check=True, capture_output=True, text=True,
    )  # fmt: skip
    made, faults = process.stdout.split()
    return made, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    assert told("default")[1] > 1000
    made, faults = told("keep")
    assert (made, faults < 100) == ("True", True)
    assert told("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False", "the environment takes precedence"
