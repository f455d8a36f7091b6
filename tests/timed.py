"""Run a command and print how long it took: `python tests/timed.py make check`.

CPU seconds are those of all processes below it, also of the ones that outlived their parents.
"""

import ctypes
import os
import resource
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
LEFTOVER_SECONDS = 10


def reap_orphans():
    """Wait for processes that outlived their parents, so that their CPU time counts."""
    end = time.monotonic() + LEFTOVER_SECONDS
    while time.monotonic() < end:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
        except ChildProcessError:
            return
    print("some processes of the command are still running", file=sys.stderr)


def main():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    start = time.monotonic()
    status = subprocess.call(sys.argv[1:])
    seconds = time.monotonic() - start
    reap_orphans()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{seconds:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s of CPU")
    sys.exit(status)


if __name__ == "__main__":
    main()
