"""Trackers: what they are given, runs that go on without one that fails, and runs that are resumed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial

import pytest
from builders import CPU, make_recipe
from click.testing import CliRunner
from moments import with_variables
from spawned import run
from stopping import interrupted

from coursepack.config import write_yaml
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.tracking import TRACKERS, TRACKING_FILE
from coursepack.distill.runs.tracking.base import TrackerKind
from coursepack.distill.runs.train import train
from coursepack.errors import RecipeError, TrainingDiverged, UnknownName

FIELDS = {"limit": 64, "batch_size": 32, "epochs": 3}
WORDS = ["--student", "digits-small", "--source", "digits", "--view", "digits", "--limit", 64, "--epochs", 3]


@dataclass
class Service:
    """A service that notes what it is told."""

    started: list = field(default_factory=list)
    logged: list = field(default_factory=list)
    ended: list = field(default_factory=list)
    fails_at: int | None = None
    fails_at_the_end: bool = False
    refuses: str = ""

    def start(self, run):
        if self.refuses:
            raise ConnectionError(f"{self.refuses}\nmore of it")
        self.started.append(run)
        return Session(self, run)


class Session:
    def __init__(self, service, run):
        self.service, self.run = service, run
        self.state = {"id": (run.state or {}).get("id", f"id-{len(service.started)}")}

    def log(self, metrics):
        if metrics["epoch"] == self.service.fails_at:
            raise ConnectionError("the service is gone\nand more")
        self.service.logged.append((self.state["id"], metrics["epoch"], metrics["train"]["loss"]))

    def end(self, error):
        if self.service.fails_at_the_end:
            raise OSError("cannot say goodbye")
        self.service.ended.append((self.state["id"], error))


@pytest.fixture
def service(monkeypatch):
    made = Service()
    monkeypatch.setitem(TRACKERS, "fake", TrackerKind(lambda: None, made.start))
    return made


def losses(run):
    return [line["train"]["loss"] for line in load_run(run).metrics]


def test_a_tracker_is_given_the_recipe_and_every_epoch(service, tmp_path):
    recipe = make_recipe(**FIELDS)
    train(recipe, tmp_path / "o", device=CPU, track=("fake", "fake"))
    [run] = service.started
    assert (run.folder, run.name, run.first, run.state) == (tmp_path / "o", "o", None, None)
    assert run.recipe == recipe.model_dump(mode="json")
    assert service.logged == [("id-1", epoch, loss) for epoch, loss in enumerate(losses(tmp_path / "o"))]
    assert service.ended == [("id-1", None)]
    assert json.loads((tmp_path / "o" / TRACKING_FILE).read_text()) == {"fake": {"id": "id-1"}}


def test_a_resumed_run_continues_the_same_tracked_run(service, tmp_path, monkeypatch):
    out, recipe = tmp_path / "o", make_recipe(**FIELDS)
    interrupted(monkeypatch, recipe, out, saves=3, track=["fake"])
    [(identifier, error)] = service.ended
    assert (identifier, type(error).__name__) == ("id-1", "Stopped")
    train(recipe, out, device=CPU, resume=True, track=["fake"])
    assert [(run.first, run.state) for run in service.started] == [(0, None), (1, {"id": "id-1"})]
    assert service.logged == [("id-1", epoch, loss) for epoch, loss in enumerate(losses(out))]
    assert service.ended[1:] == [("id-1", None)]


def test_a_run_that_is_replaced_is_tracked_anew(service, tmp_path):
    for _ in range(2):
        train(make_recipe(**FIELDS), tmp_path / "o", device=CPU, track=["fake"], overwrite=True)
    assert [run.state for run in service.started] == [None, None]
    assert json.loads((tmp_path / "o" / TRACKING_FILE).read_text()) == {"fake": {"id": "id-2"}}


@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_tracker_that_fails_does_not_lose_the_run(service, tmp_path, capsys, where):
    plain, out = tmp_path / "plain", tmp_path / "o"
    train(make_recipe(**FIELDS), plain, device=CPU)
    service.fails_at, service.fails_at_the_end = (1, False) if where == "middle" else (None, True)
    capsys.readouterr()
    train(make_recipe(**FIELDS), out, device=CPU, track=["fake"])
    assert losses(out) == losses(plain)
    problem = "ConnectionError: the service is gone" if where == "middle" else "OSError: cannot say goodbye"
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: fake does not track {out} any longer: {problem}. The run is not affected, and its metrics "
        "are in metrics.jsonl"
    ]
    assert len(service.logged) == (1 if where == "middle" else 3)


def test_a_tracker_that_does_not_start_ends_the_run_before_its_first_step(service, tmp_path):
    service.refuses = "no connection"
    with pytest.raises(RecipeError) as caught:
        train(make_recipe(**FIELDS), tmp_path / "o", device=CPU, track=["fake"])
    assert str(caught.value) == (
        f"fake cannot track the run {str(tmp_path / 'o')!r}: ConnectionError: no connection. No step was "
        "taken: repair the connection or the settings of fake, or leave --track fake out"
    )
    assert not (tmp_path / "o").exists()


def test_a_run_is_kept_if_its_tracker_does_not_continue(service, tmp_path, monkeypatch):
    out, recipe = tmp_path / "o", make_recipe(**FIELDS)
    interrupted(monkeypatch, recipe, out, saves=3, track=["fake"])
    service.refuses = "no such run"
    with pytest.raises(RecipeError, match=f"or remove {out / TRACKING_FILE} to track a new one"):
        train(recipe, out, device=CPU, resume=True, track=["fake"])
    train(recipe, out, device=CPU, resume=True)
    assert len(losses(out)) == 3


def test_a_diverged_run_is_tracked_as_failed(service, tmp_path, monkeypatch):
    module = sys.modules["coursepack.distill.runs.student"]
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: {"accuracy": 0.5, "nll": float("nan")})
    with pytest.raises(TrainingDiverged):
        train(make_recipe(**FIELDS), tmp_path / "o", device=CPU, track=["fake"])
    [(_, error)] = service.ended
    assert isinstance(error, TrainingDiverged)


def test_students_of_groups_and_sweeps_are_tracked_one_by_one(service, tmp_path):
    recipe = make_recipe(student="digits-small", peers=["digits-small"], method="dml", limit=32)
    train(recipe, tmp_path / "dml", device=CPU, track=["fake"])
    assert [run.name for run in service.started] == ["dml/0", "dml/1"]
    assert [run.recipe.get("member", 0) for run in service.started] == [0, 1]
    service.started.clear()
    base = {"student": "digits-small", "source": "digits", "view": "digits", "epochs": 1, "limit": 32}
    (tmp_path / "grid.yaml").write_text(write_yaml({"base": base, "grid": {"seed": [0, 1]}}))
    words = ["sweep", "grid.yaml", "--out", "runs", "--together", "2", "--track", "tensorboard"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = CliRunner().invoke(distill, words)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("runs/*/tensorboard/*"))) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_named_before_the_run(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    words = ["train", *map(str, WORDS), "--track", name, "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(distill, words)
    assert result.exit_code == 1
    assert f"--track {name} needs a library that is not installed" in result.stderr
    assert f"pip install 'coursepack[{name}]'" in result.stderr
    assert not (tmp_path / "o").exists()


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(UnknownName, match=r"unknown tracker 'wandbb'. Did you mean 'wandb'\?"):
        train(make_recipe(**FIELDS), tmp_path / "o", device=CPU, track=["wandbb"])


# The real libraries

STOPPED = """
import sys

from coursepack.distill.cli import main
from coursepack.distill.runs.student import StudentRun

end_epoch = StudentRun.end_epoch

def stopping(self, *arguments):
    end_epoch(self, *arguments)
    if self.position.epoch == 2:
        raise KeyboardInterrupt

StudentRun.end_epoch = stopping
main(sys.argv[1:])
"""


RESUMED = """
import sys

from coursepack.distill.cli import main

main(sys.argv[1:])
"""


def tracked(tmp_path, monkeypatch, name, **environment):
    """Train a run that is interrupted once, tracked by a real library; returns its folder."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    words = ["train", *WORDS, "--checkpoint-seconds", 0, "--track", name, "--resume", "--out", out]
    for code, status in ((STOPPED, 130), (RESUMED, 0)):
        result = run("code", code, *words, before=partial(with_variables, environment))
        assert result.returncode == status, result.stderr
    return out


def records(file):
    """The records of a file of Weights & Biases, which is a log in LevelDB's format after seven bytes."""
    data, offset, whole, block = file.read_bytes(), 7, b"", 1 << 15
    while offset + 7 <= len(data):
        if block - offset % block < 7:
            offset += block - offset % block
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        whole += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@pytest.mark.integration
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an extra")
    from wandb.proto.wandb_internal_pb2 import Record

    out = tracked(tmp_path, monkeypatch, "wandb", WANDB_MODE="offline")
    identifier = json.loads((out / TRACKING_FILE).read_text())["wandb"]["id"]
    files = sorted((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identifier}.wandb"] * 2
    logged, names, exits = {}, set(), []
    for file in files:
        for data in records(file):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
                }
                values = {name: json.loads(text) for name, text in items.items()}
                logged.setdefault(values["epoch"], []).append((values["_step"], values["train/loss"]))
            if record.HasField("run"):
                names.add((record.run.run_id, record.run.display_name, record.run.project))
            if record.HasField("exit"):
                exits.append(record.exit.exit_code)
    wanted = dict(enumerate(losses(out)))
    assert {epoch: set(found) for epoch, found in logged.items()} == {
        e: {(e, loss)} for e, loss in wanted.items()
    }
    assert names == {(identifier, "run", "coursepack")}
    assert exits == [1, 0]


@pytest.mark.integration
def test_mlflow_in_a_local_database(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="an extra")
    out = tracked(tmp_path, monkeypatch, "mlflow", GIT_PYTHON_REFRESH="quiet")
    kept = json.loads((out / TRACKING_FILE).read_text())["mlflow"]
    code = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
[experiment] = [each for each in client.search_experiments() if each.name == "coursepack"]
[run] = client.search_runs([experiment.experiment_id])
history = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/loss")]
print(json.dumps([run.info.run_id, run.info.run_name, run.info.status, history, run.data.params]))
"""
    command = [sys.executable, "-c", code, kept["uri"]]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    identifier, name, status, history, params = json.loads(result.stdout.splitlines()[-1])
    assert (identifier, name, status) == (kept["run_id"], "run", "FINISHED")
    assert history == [[epoch, loss] for epoch, loss in enumerate(losses(out))]
    assert (params["student"], params["optimizer.lr"], params["epochs"]) == ("digits-small", "0.05", "3")
