"""Sweeps and chains over Ray: same bytes as in one process, whatever is killed and when."""

import json
import os
import pickle
import re
import sys
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from builders import CPU, make_recipe
from click.testing import CliRunner
from clusters import on_cluster, wait_until
from helpers import store_files
from spawned import run, running

from coursepack import errors
from coursepack.data.store.cache import LIMIT_VARIABLE
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.chain.stages import How, stages_at_once
from coursepack.distill.runs.cluster import WITNESS, RayExecutor, Report, Worker, _check_report, _Runs
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.sweep import Student, SweepOptions, read_grid, sweep
from coursepack.errors import StudentsLost, UnknownName, WorkerLost, WorkerMismatch

STUDENT = "python:cluster_teacher:Teacher"


def write_grid(folder, grid, **base):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": base, "grid": grid}))
    return path


def results(run):
    """Weights and metrics of a finished run, but for its seconds."""
    weights = [(run / f"{name}.safetensors").read_bytes() for name in ("student", "best")]
    return weights, [{**line, "seconds": 0} for line in load_run(run).metrics]


@pytest.fixture(scope="module")
def alone(started, tmp_path_factory, stores):
    """A grid of four students, their folders by one process, and the number of batches that they ran."""
    folder = tmp_path_factory.mktemp("alone")
    common = {"student": STUDENT, "stores": [str(stores[0])], "epochs": 3, "limit": 200, "batch_size": 50}
    grid = write_grid(folder, {"seed": [0, 1], "optimizer.lr": [0.01, 0.02]}, **common)
    started.calm()
    assert sweep(read_grid(grid), folder / "out", device=CPU, together=2) == {}
    return grid, {path.name: results(path) for path in (folder / "out").iterdir()}, len(started.batches())


def has_checkpoint(out):
    """A function that returns whether a run in a folder has a checkpoint."""
    return lambda: any(out.glob("*/checkpoint.pt"))


@on_cluster
def test_the_runs_of_a_killed_worker_go_on_from_their_checkpoints(tmp_path, cluster, alone):
    grid, expected, batches = alone
    out = tmp_path / "out"
    how = {"device": "cpu", "together": 2, "checkpoint_seconds": 0}
    with ThreadPoolExecutor(1) as pool:
        with cluster.held(after=20):
            swept = pool.submit(sweep, read_grid(grid), out, executor=RayExecutor(cluster.address), **how)
            wait_until(has_checkpoint(out), lambda: swept.result() if swept.done() else None)
            (cluster.folder / "once").touch()
        assert swept.result() == {}
    assert {path.name: results(path) for path in out.iterdir()} == expected
    assert not (cluster.folder / "once").exists()
    # Those of one step, or of one evaluation, of two students.
    assert batches < len(cluster.batches()) <= batches + 6
    assert len(set(cluster.batches())) >= 2


@on_cluster
def test_a_driver_that_was_killed_goes_on(tmp_path, cluster, alone):
    grid, expected, batches = alone
    out = tmp_path / "out"
    words = ["distill", "sweep", grid, "--out", out, "--resume", "--json", "--checkpoint-seconds=0"]
    words += ["--together=4", "--device=cpu", "--executor=ray", f"--address={cluster.address}"]
    # In a process of the tests, warnings are errors, and Ray has some.
    with cluster.held(after=10), running(*words, before=warnings.resetwarnings) as (process, finished):
        wait_until(has_checkpoint(out), lambda: None if process.is_alive() else finished())
        process.kill()
        finished()
    done = run(*words, before=warnings.resetwarnings)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert [group["runs"] for group in json.loads(done.stdout)] == [2, 2]
    assert {path.name: results(path) for path in out.iterdir()} == expected
    # Those of one step of four students.
    assert len(cluster.batches()) <= batches + 4


@on_cluster
def test_runs_that_kill_three_workers_are_named_and_the_others_trained(tmp_path, cluster, stores):
    (cluster.folder / "poison").touch()
    common = {"student": STUDENT, "stores": [str(stores[0])], "epochs": 1, "limit": 142}
    grid = write_grid(tmp_path, {"batch_size": [100, 71]}, **common)
    words = ["sweep", str(grid), "--out", str(tmp_path / "out"), "--device=cpu"]
    words += ["--executor=ray", f"--address={cluster.address}"]
    result = CliRunner().invoke(distill, words)
    assert result.exit_code == 1
    text = r"""Error: not trained, because each has lost 3 workers, the last one because:
  batch_size=100: .+
All others are finished"""
    assert re.search(text, result.stderr), result.stderr
    assert "accuracy" in result.stdout
    assert (tmp_path / "out" / "batch_size=71" / "student.safetensors").is_file()


CHAIN = """
base: {source: digits:train, view: digits, epochs: 2, limit: 80, batch_size: 40, optimizer: {lr: 0.1}}
stages:
  - {name: teacher, train: {student: digits-small}}
  - {name: targets, precompute: {teacher: stage:teacher, views: 2, block_rows: 500}}
  - {name: other, train: {student: digits-small, seed: 3}}
  - {name: student, train: {student: digits-small, stores: [stage:targets], seed: 1}}
  - {name: both, ensemble: {runs: [stage:other, stage:student]}}
"""


def chain_content(out):
    """Bytes of everything in a chain's folder, and the metrics of its runs but for their seconds."""
    metrics = {name: results(out / name)[1] for name in ("teacher", "other", "student")}
    files = {path: data for path, data in store_files(out).items() if "/runs/" not in path}
    return {path: data for path, data in files.items() if not path.endswith("metrics.jsonl")}, metrics


@on_cluster
def test_a_chain_is_that_of_one_process(tmp_path, cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chain.yaml").write_text(CHAIN)
    words = ["distill", "chain", "chain.yaml", "--out=out", "--device=cpu"]
    here = run(*words)
    assert here.returncode == 0, here.stderr
    Path("out").rename("here")  # runs record the paths of their stores
    words += ["--executor=ray", f"--address={cluster.address}"]
    there = run(*words, before=warnings.resetwarnings)
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout
    assert chain_content(Path("out")) == chain_content(Path("here"))
    order = re.findall(r"^stage \d of 5, (\w+): ", there.stderr, re.M)
    assert order == ["teacher", "other", "targets", "student", "both"]


# Without a cluster.


def test_a_worker_trains_what_is_not_finished_in_the_folder_of_the_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv(LIMIT_VARIABLE, "1G")
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(limit=50)
    group = [Student(f"seed={seed}", recipe.model_copy(update={"seed": seed})) for seed in (0, 1)]
    assert sweep(group[:1], tmp_path / "out", device=CPU) == {}
    before = (tmp_path / "out" / "seed=0" / "student.safetensors").stat()
    worker = Worker()
    report = worker.start(str(tmp_path), "out", b"12", "cpu", "5G", 1)
    assert not report.sees_folder
    with pytest.raises(WorkerLost, match=r"does not find the folder 'out' .*all nodes share"):
        _check_report(report, Path("out"))
    (tmp_path / "out" / WITNESS).write_bytes(b"12")
    _check_report(worker.start(str(tmp_path), "out", b"12", "cpu", "5G", 1), Path("out"))
    assert os.environ[LIMIT_VARIABLE] == "5G"
    assert worker.train(group, SweepOptions(threads=1)) == ({}, [])
    assert (tmp_path / "out" / "seed=0" / "student.safetensors").stat() == before
    assert (tmp_path / "out" / "seed=1" / "student.safetensors").is_file()
    diverging = Student("lr=1e30", make_recipe(limit=50, batch_size=25, optimizer={"lr": 1e30}))
    failures, alone = worker.train([diverging], SweepOptions(threads=1))
    assert (list(failures), alone) == (["lr=1e30"], [])
    assert sweep(group, tmp_path / "out", device=CPU, resume=True) == {}


def test_a_worker_with_other_libraries_does_not_fit():
    report = Report("node7, process 4")
    _check_report(report, Path("out"))
    other = Report(report.name, versions={**report.versions, "torch": "0.4"})
    text = r"node7, process 4, has other versions of libraries(.|\n)*torch .*worker: 0\.4"
    with pytest.raises(WorkerMismatch, match=text):
        _check_report(other, Path("out"))


def test_students_that_lost_a_worker_share_the_next_and_have_their_last_alone(tmp_path):
    group = [Student(f"lr={lr}", make_recipe(optimizer={"lr": lr})) for lr in (0.1, 0.2)]
    runs = _Runs([group], tmp_path, SweepOptions(together=2))
    sizes = []
    while runs.waiting:
        sizes.append([len(each) for each in runs.waiting])
        runs.put_back(runs.waiting.popleft(), "The node died")
    assert sizes == [[2], [2], [1, 1], [1]]
    assert runs.left == 0
    with pytest.raises(StudentsLost, match=r"lost 3 workers(.|\n)*lr=0\.1: The node died\n  lr=0\.2"):
        runs.check()
    runs.diverged = {"lr=9": "the loss is nan"}
    with pytest.raises(StudentsLost, match=r"lr=0\.2: The node died\nDiverged: lr=9\.\nAll others are fini"):
        runs.check()


def test_groups_that_diverged_within_a_step_are_trained_one_by_one(tmp_path):
    group = [Student(f"lr={lr}", make_recipe(optimizer={"lr": lr})) for lr in (0.1, 0.2)]
    runs = _Runs([group, group[:1]], tmp_path, SweepOptions(together=2))
    runs.finish(runs.waiting.popleft(), {}, [group[:1], group[1:]])
    assert list(runs.waiting) == [group[:1], group[1:], group[:1]]
    assert runs.left == 3
    runs.finish(runs.waiting.popleft(), {"lr=0.1": "the loss is nan"}, [])
    assert (runs.left, runs.diverged) == (2, {"lr=0.1": "the loss is nan"})
    runs.check()


Planned = namedtuple("Planned", "name kind reads")


def test_independent_stages_train_at_once_on_a_cluster_and_in_their_order_here():
    stages = [
        Planned("teacher", "train", ()),
        Planned("targets", "precompute", ("teacher",)),
        Planned("other", "train", ()),
        Planned("student", "train", ("targets",)),
        Planned("both", "ensemble", ("other", "student")),
    ]

    def names(executor):
        groups = stages_at_once(stages, How(CPU, executor=executor))
        return [[stage.name for stage in group] for group in groups]

    assert names(None) == [[stage.name] for stage in stages]
    assert names("ray") == [["teacher", "other"], ["targets"], ["student"], ["both"]]


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ("--executor ray", 1, "--executor ray needs ray, which cannot be imported: .*coursepack.cluster."),
        ("--gpus-per-run 0.5", 2, "--gpus-per-run does not apply to --executor local: give --executor ray"),
        ("--executor ray --gpus-per-run 0", 2, "0.* is not in the range"),
        ("--executor ray --address ray://head:10001", 1, "needs ray|one of Ray Client"),
    ],
)
@pytest.mark.parametrize("command", ["sweep", "chain"])
def test_wrong_options_of_executors_are_refused(tmp_path, monkeypatch, command, options, status, text):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [command, str(tmp_path / "file.yaml"), "--out", str(tmp_path / "out"), *options.split()]
    result = CliRunner().invoke(distill, words)
    assert result.exit_code == status
    assert re.search(text, result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_of_other_processes_are_the_same_here():
    kinds = [kind for kind in vars(errors).values() if getattr(kind, "__module__", "") == errors.__name__]
    kinds = [kind for kind in kinds if isinstance(kind, type)]
    found = [kind("a text") for kind in kinds if kind is not UnknownName]
    assert len(found) > 20
    for error in (*found, UnknownName("view", "digts", ["digits"])):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
