"""The batch scripts of the docs, run by a Slurm of two nodes on this machine."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import make_job, store_files
from slurm_nodes import left_of, own_slurm
from spawned import free_port

from coursepack.data.store import verify
from coursepack.distill.runs.folder import load_run
from coursepack.precompute import run_job

pytestmark = pytest.mark.integration

TESTS = Path(__file__).parent
FIELDS = {"views": 2, "batch_size": 10, "block_rows": 24}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster whose jobs find the programs of these tests. Nothing is left of it afterwards."""
    folder = tmp_path_factory.mktemp("slurm")
    with own_slurm(folder) as own:
        own.program("precompute", sys.executable, TESTS / "held_writer.py")
        own.program("distill", sys.executable, "-m", "coursepack.distill.cli")
        own.program("torchrun", sys.executable, "-m", "torch.distributed.run")
        yield own
    own.wait_until(lambda: left_of(folder) == [], seconds=20)


def script_of(page, replaced):
    """The batch script of a page, with the words of a small job in place of some."""
    (text,) = re.findall(
        r"^```bash\n(#!/bin/bash\n.*?)^```$", (TESTS.parent / "docs" / page).read_text(), re.M | re.S
    )
    for old, new in replaced.items():
        assert text.count(old) == 1, f"{page} has {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def store(slurm, teacher):
    """The store that an array of two tasks writes, each of which is interrupted once."""
    words = f"--teacher run:{teacher} --source digits --view digits --views 2 --batch-size 10 --block-rows 24"
    small = {"0-15": "0-1", "/16": "/2", "=8": "=1", " --gpus=1": ""}
    small |= {"...": f"{words} --device cpu --store s.zarr"}
    array = slurm.submit(script_of("precompute.md", small))
    tasks = [f"{array}_{index}" for index in (0, 1)]
    for index in (0, 1):
        slurm.wait_until((slurm.folder / f"begun-{index}").exists)
    # One task is cancelled, the other receives the signal that precedes its time limit, and requeues itself.
    slurm.command("scancel", tasks[0])
    slurm.command("scancel", "--signal=TERM", tasks[1])
    slurm.wait_for(tasks[0], "CANCELLED")
    slurm.command("scontrol", "requeue", tasks[0])
    for task in tasks:
        slurm.wait_for(task, "PENDING")
        slurm.command("scontrol", "update", f"JobId={task}", "StartTime=now")
    for task in tasks:
        slurm.wait_for(task, *ENDED)
    return slurm.folder / "s.zarr", tasks


def test_interrupted_tasks_of_an_array_write_the_store_of_one_process(tmp_path, slurm, store, teacher):
    path, tasks = store
    assert [slurm.job(task)["JobState"] for task in tasks] == ["COMPLETED"] * 2, slurm.written()
    assert [slurm.job(task)["Restarts"] for task in tasks] == ["1"] * 2
    # Both finished their batch and ended in order.
    assert [(slurm.folder / f"batches-{index}").stat().st_size for index in (0, 1)] == [20, 20]
    runs = [json.loads(file.read_text()) for file in (path / "runs").iterdir()]
    assert len(runs) == 4
    assert all(run["ended"] for run in runs)
    run_job(make_job(tmp_path / "once.zarr", teacher, **FIELDS), quiet=True)
    assert store_files(path) == store_files(tmp_path / "once.zarr")
    assert verify(path).problems == ()


def test_a_student_is_trained_on_two_nodes(slurm, store):
    path, _ = store
    small = {"--cpus-per-task=64": "--cpus-per-task=1", " --gpus-per-node=8": "", "node 8": "node 1"}
    small |= {"29500": str(free_port()), "/shared/runs/kd": "kd"}
    small |= {"...": f"--device cpu --student digits-small --epochs 1 --limit 64 --store {path}"}
    job = slurm.submit(script_of("distributed.md", small))
    slurm.wait_for(job, *ENDED)
    assert slurm.job(job)["JobState"] == "COMPLETED", slurm.written()
    found = load_run(slurm.folder / "kd")
    assert len(found.metrics) == 1
    assert json.loads((found.path / "provenance.json").read_text())["ranks"] == 2
