"""OpenMP threads of threads that work side by side."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, threading, time
import torch
from coursepack.kernels.cpu.threads import end_idle_threads, use_threads

def tasks():
    return len(os.listdir("/proc/self/task"))

def new_tasks():
    before = tasks()
    torch.ones(1 << 20).exp_()
    return tasks() - before

def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

torch.set_num_threads(2)
others = tasks()  # of other libraries; OpenMP starts its own when something is computed
told = {"first": new_tasks(), "again": new_tasks()}
end_idle_threads()
end = time.monotonic() + 30
while tasks() > others and time.monotonic() < end:
    time.sleep(0.01)
told["ended"] = new_tasks()

def alone():
    use_threads(1)
    told["alone"] = (new_tasks(), torch.get_num_threads())

in_thread(alone)
in_thread(lambda: told.update(other=torch.get_num_threads()))
told["main"] = torch.get_num_threads()
print(json.dumps(told))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_threads_of_one_thread_do_not_concern_another():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    told = json.loads(process.stdout)
    assert told == {"first": 1, "again": 0, "ended": 1, "alone": [0, 1], "other": 2, "main": 2}
