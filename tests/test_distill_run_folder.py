"""A run's folder: one process at a time, and nothing left of a run that did no step."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import CPU, make_recipe
from click.testing import CliRunner

from coursepack.distill.cli import main as distill
from coursepack.distill.runs.folder import PROVENANCE_FILE, RUN_FILES, RunFolder, load_run
from coursepack.distill.runs.train import train
from coursepack.errors import RunBusy, StoreDamaged
from coursepack.locks import FileLock, Held
from coursepack.models.build import build_network

FOLDER = sys.modules["coursepack.distill.runs.folder"]
SMALL = {"limit": 100, "epochs": 2}


@pytest.fixture
def damaged(tmp_path, stores):
    """A store with one bit of its first view flipped, and a function that mends it."""
    path = tmp_path / "s.zarr"
    shutil.copytree(stores[0], path)
    shard = next((path / "logits").rglob("c.0.0*"))
    sound = shard.read_bytes()
    shard.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    return path, lambda: shard.write_bytes(sound)


def command(*words):
    return CliRunner().invoke(distill, [*map(str, words), "--device", "cpu", "--threads", "1"])


@pytest.mark.parametrize("reading", ["auto", "mapped", "windowed"])
def test_a_damaged_shard_leaves_no_folder(tmp_path, damaged, reading):
    store, mend = damaged
    words = ["train", "--student", "digits-small", "--store", store, "--epochs", 1, "--limit", 100]
    words += ["--set", f"reading={reading}", "--out", tmp_path / "runs" / "kd"]
    result = command(*words)
    assert result.exit_code == 1
    assert re.search(r"Error: .*does not match its checksum", result.stderr), result.output
    assert f"Run `precompute verify --store {store} --repair`" in result.stderr
    assert not (tmp_path / "runs").exists()
    mend()
    assert command(*words).exit_code == 0


@pytest.mark.parametrize("removed", range(len(RUN_FILES)))
def test_a_kill_while_the_files_of_a_run_are_removed_leaves_one_to_resume(tmp_path, monkeypatch, removed):
    recipe, unlink, done = make_recipe(**SMALL), Path.unlink, []

    def killed(self, missing_ok=False):
        if len(done) == removed:
            raise KeyboardInterrupt
        done.append(self)
        unlink(self, missing_ok=missing_ok)

    folder = RunFolder(tmp_path / "o")
    folder.begin(recipe, {}, build_network("digits-small", 10), overwrite=False)
    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.close(keep=False)
    monkeypatch.setattr(Path, "unlink", unlink)
    folder._lock.release()
    train(recipe, tmp_path / "o", device=CPU, resume=True)
    assert load_run(tmp_path / "o").recipe.limit == SMALL["limit"]


def test_a_damaged_shard_leaves_an_overwritten_run_as_it_is(tmp_path, damaged):
    store, _ = damaged
    train(make_recipe(**SMALL), tmp_path / "o", device=CPU)
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    with pytest.raises(StoreDamaged):
        train(make_recipe([store], **SMALL), tmp_path / "o", device=CPU, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


def test_a_sweep_goes_on_once_the_cause_is_mended(tmp_path, damaged):
    store, mend = damaged
    base = {"stores": [str(store)], "student": "digits-small", **SMALL}
    path = tmp_path / "grid.yaml"

    def swept(**grid):
        path.write_text(yaml.safe_dump({"base": base, "grid": grid}))
        return command("sweep", path, "--out", tmp_path / "sweep", "--together", 2)

    grid = {"objective.temperature": [1, 4]}
    wrong = swept(**grid, **{"objective.divergence": ["klx"]})
    assert (wrong.exit_code, "divergence: expected 'kl', " in wrong.stderr) == (1, True)
    assert swept(**grid).exit_code == 1
    assert not (tmp_path / "sweep").exists()
    mend()
    assert swept(**grid).exit_code == 0


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch, there):
    out, write = tmp_path / "a" / "b", FOLDER.write_whole
    if there:
        out.mkdir(parents=True)

    def full(path, *pieces):
        if path.name == PROVENANCE_FILE:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(FOLDER, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            train(make_recipe(**SMALL), out, device=CPU)
    assert list(tmp_path.rglob("*")) == ([out.parent, out] if there else [])
    train(make_recipe(**SMALL), out, device=CPU)


def test_a_run_that_did_a_step_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "log", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        train(make_recipe(**SMALL), tmp_path / "o", device=CPU)
    monkeypatch.undo()
    assert (tmp_path / "o" / "recipe.yaml").is_file()
    train(make_recipe(**SMALL), tmp_path / "o", device=CPU, resume=True)


HOLD = """
import os, sys, time
from pathlib import Path
from coursepack.locks import FileLock
FileLock(Path(sys.argv[1]) / "lock")
if "fork" not in sys.argv:
    print("held", flush=True)
elif not os.fork():
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the lock of a run's folder."""
    started = []

    def hold(folder, *words):
        command = [sys.executable, "-c", HOLD, folder, *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, hold, monkeypatch):
    out, recipe = tmp_path / "o", make_recipe(**SMALL)
    monkeypatch.setattr(RunFolder, "log", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        train(recipe, out, device=CPU, checkpoint_seconds=0)
    monkeypatch.undo()
    process, _ = hold(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    text = (
        rf"run '.*o' is being trained by process {process.pid} on {re.escape(os.uname().nodename)}, since 20"
    )
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RunBusy, match=text):
            train(recipe, out, device=CPU, **how)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    process.kill()
    process.wait()
    train(recipe, out, device=CPU, resume=True)
    assert [line["epoch"] for line in load_run(out).metrics] == [0, 1]
    assert not (out / "lock").exists()


def test_a_kill_releases_the_lock_though_workers_live_on(tmp_path, hold):
    process, child = hold(tmp_path, "fork")
    child = int(child)
    try:
        with pytest.raises(Held, match=f"process {process.pid} on "):
            FileLock(tmp_path / "lock")
        process.kill()
        process.wait()
        FileLock(tmp_path / "lock").release()
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_that_a_kill_left_is_taken(tmp_path, hold):
    process, _ = hold(tmp_path)
    with pytest.raises(Held):
        FileLock(tmp_path / "lock")
    process.kill()
    process.wait()
    assert (tmp_path / "lock").exists()
    FileLock(tmp_path / "lock").release()
    assert not (tmp_path / "lock").exists()


def test_systems_without_flock_train(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["coursepack.locks"], "fcntl", None)
    train(make_recipe(**SMALL), tmp_path / "o", device=CPU)
    assert not (tmp_path / "o" / "lock").exists()
