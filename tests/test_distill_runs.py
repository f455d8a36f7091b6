"""Run folders: what is in them, training them again to the last bit, and refusing unfinished ones."""

import errno
import json
import os
import sys

import pytest
import yaml
from builders import CPU, make_recipe, write_store, write_teacher
from click.testing import CliRunner
from safetensors.torch import load_file

from coursepack.data import open_source, view_fingerprint, view_recipe
from coursepack.data.store import load_manifest
from coursepack.distill.cli import main as distill
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.runs.folder import RunFolder, load_run
from coursepack.distill.runs.train import train
from coursepack.distill.setup.resolve import resolve_recipe
from coursepack.errors import RunError, TeacherMismatch, TrainingDiverged
from coursepack.models import build_network, load_teacher

NAMES = {
    *("recipe.yaml", "provenance.json", "network.yaml", "metrics.jsonl"),
    *("best.safetensors", "student.safetensors"),
}


def metrics_of(run):
    """Metrics per epoch, but for the time they took."""
    return [{**line, "seconds": None} for line in load_run(run).metrics]


def call(*words):
    result = CliRunner().invoke(distill, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory, stores):
    """A finished run of three epochs over two stores."""
    out = tmp_path_factory.mktemp("runs") / "kd"
    train(make_recipe(stores[:2], epochs=3, limit=200, views=2, seed=5), out, device=CPU)
    return out


def test_a_run_folder_holds_everything(run, stores):
    assert {path.name for path in run.iterdir()} == NAMES
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["stores"] == [str(store) for store in stores[:2]]
    assert (recipe["seed"], recipe["epochs"], recipe["objective"]["temperature"]) == (5, 3, 4.0)
    assert load_run(run).recipe == make_recipe(stores[:2], epochs=3, limit=200, views=2, seed=5)

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["view"]) for line in lines] == [(0, 0), (1, 1), (2, 0)]
    assert all(line["seconds"] > 0 for line in lines)
    assert set(lines[0]["train"]) == {
        *("loss", "soft_target", "accuracy", "accuracy_top5", "nll", "calibration_error")
    }
    assert set(lines[0]["evaluation"]) == {"accuracy", "nll", "accuracy_top5", "calibration_error"}
    assert lines[2]["train"]["loss"] < lines[0]["train"]["loss"]


def test_provenance_says_where_the_targets_came_from(run, stores):
    facts = json.loads((run / "provenance.json").read_text())
    source = open_source("digits")
    assert facts["stores"] == [
        {
            "path": str(store.resolve()),
            "fingerprint": load_manifest(store).fingerprint,
            "views": [0, 1, 2],
            "encoding": {"name": "float32"},
            "reading": "resident",
        }
        for store in stores[:2]
    ]
    assert facts["source_fingerprint"] == source.fingerprint
    assert facts["view_fingerprint"] == view_fingerprint(view_recipe("digits"), source)
    assert set(facts["versions"]) == {"coursepack", "torch", "torchvision", "numpy"}
    assert facts["device"] == "cpu"


def test_the_weights_are_those_after_the_last_epoch(run):
    digits = open_source("digits:test")
    network = load_teacher(f"run:{run}", digits.class_names)
    assert network.spec == "digits-small"
    shapes = {name: tuple(value.shape) for name, value in load_file(run / "student.safetensors").items()}
    assert shapes == {name: tuple(value.shape) for name, value in network.module.state_dict().items()}
    told = json.loads(call("eval", run, "--json"))
    assert told == {"run": str(run), "source": "digits:test", **load_run(run).metrics[-1]["evaluation"]}
    elsewhere = json.loads(call("eval", run, "--source", "digits:train", "--json"))
    assert elsewhere["source"] == "digits:train"
    assert elsewhere["nll"] != told["nll"]


@pytest.mark.parametrize("online", [False, True])
def test_the_recipe_of_a_run_trains_it_again(tmp_path, run, stores, online):
    if online:
        first = tmp_path / "first"
        train(make_recipe(stores[1:2], epochs=2, limit=200, online=True), first, device=CPU)
    else:
        first = run
    again = tmp_path / "again"
    said = call("train", first / "recipe.yaml", "--out", again)
    assert said.startswith(f"{again}: accuracy ")
    assert metrics_of(again) == metrics_of(first)
    for name in NAMES - {"metrics.jsonl"}:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


def test_flags_replace_what_a_recipe_says(tmp_path, run):
    call("train", run / "recipe.yaml", "--seed", 6, "--epochs", 1, "--temperature", 2, "--lr", 0.1,
         "--set", "objective.hard_weight=0.5", "--set", "batch_size=32", "--out", tmp_path / "o")  # fmt: skip
    changed = load_run(tmp_path / "o").recipe
    assert (changed.seed, changed.epochs, changed.batch_size) == (6, 1, 32)
    assert (changed.optimizer.lr, changed.optimizer.momentum) == (0.1, 0.9)
    told = changed.objective
    assert (told.temperature, told.hard_weight, told.soft_weight) == (2.0, 0.5, 0.9)
    assert changed.limit == 200, "what no flag names stays"


def test_another_method_brings_its_own_objective(tmp_path, run):
    call("train", run / "recipe.yaml", "--hard-weight", 0.7, "--method", "supervised",
         "--set", "stores=[]", "--epochs", 1, "--out", tmp_path / "o")  # fmt: skip
    objective = load_run(tmp_path / "o").recipe.objective
    assert (objective.soft_weight, objective.hard_weight) == (0.0, 0.7)


def test_with_stores_the_method_source_and_view_go_without_saying(tmp_path, stores):
    call("train", "--student", "digits-small", "--store", stores[0], "--epochs", 1, "--out", tmp_path / "o")
    recipe = load_run(tmp_path / "o").recipe
    assert (recipe.method, recipe.source, recipe.evaluation) == ("kd", "digits:train", "digits:test")
    assert recipe.view == view_recipe("digits")


def test_an_interrupted_run_is_refused(tmp_path, monkeypatch):
    evaluations = iter([{"accuracy": 0.5, "nll": 1.0}])
    module = sys.modules["coursepack.distill.runs.student"]
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: next(evaluations))
    with pytest.raises(StopIteration):
        train(make_recipe(limit=100, epochs=3), tmp_path / "o", device=CPU)
    assert {path.name for path in (tmp_path / "o").iterdir()} == NAMES - {"student.safetensors"}
    assert len((tmp_path / "o" / "metrics.jsonl").read_text().splitlines()) == 1
    for words in (["eval", "o"], ["compare", "o"]):
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(distill, words)
        assert result.exit_code == 1
        assert (
            result.stderr
            == "Error: run 'o' is unfinished: continue it with --resume, or replace it with --overwrite\n"
        )
    with pytest.raises(RunError, match="has no trained weights: it is unfinished"):
        load_teacher("run:o", open_source("digits").class_names)

    monkeypatch.undo()
    train(make_recipe(limit=100), tmp_path / "o", device=CPU, overwrite=True)
    assert len(load_run(tmp_path / "o").metrics) == 1


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path):
    out = tmp_path / "o"
    train(make_recipe(limit=50, epochs=2), out, device=CPU)
    (out / "notes.txt").write_text("mine")
    train(make_recipe(limit=50), out, device=CPU, overwrite=True)
    assert {path.name for path in out.iterdir()} == NAMES
    assert len(load_run(out).metrics) == 1


def test_a_diverged_run_stays_unfinished(tmp_path):
    recipe = make_recipe(limit=200, epochs=3, optimizer={"lr": 1e30})
    with pytest.raises(
        TrainingDiverged, match=r"diverged in epoch 0: \w+ is (nan|inf)\. Use a smaller --lr than 1e"
    ):
        train(recipe, tmp_path / "o", device=CPU)
    with pytest.raises(RunError, match="is unfinished"):
        load_run(tmp_path / "o")


def test_live_teachers_must_be_those_that_wrote_the_store(tmp_path):
    teacher = write_teacher(tmp_path / "teacher", seed=1)
    store = write_store(tmp_path / "t.zarr", teacher)
    weights = teacher / "student.safetensors"
    assert load_manifest(store).origin["weights_file"] == str(weights.resolve())
    weights.write_bytes((write_teacher(tmp_path / "other", seed=2) / weights.name).read_bytes())
    text = r"weights in .*student.* are not the ones that wrote the store: give the old weights"
    with pytest.raises(TeacherMismatch, match=text):
        train(make_recipe([store], online=True), tmp_path / "o", device=CPU)
    assert not (tmp_path / "o").exists()
    train(make_recipe([store], limit=50), tmp_path / "o", device=CPU)


def scripted(monkeypatch, accuracies):
    """Have evaluations say these; returns the epochs that were over at each."""
    module, asked = sys.modules["coursepack.distill.runs.student"], iter(accuracies)
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: {"accuracy": next(asked), "nll": 1.0})


def test_a_run_stops_when_it_no_longer_gets_better(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.3, 0.3, 0.2, 0.9])
    metrics = train(make_recipe(limit=100, epochs=9, patience=2), tmp_path / "o", device=CPU)
    assert (metrics["epoch"], metrics["evaluation"]["accuracy"]) == (3, 0.2)
    assert [line["epoch"] for line in load_run(tmp_path / "o").metrics] == [0, 1, 2, 3]
    monkeypatch.undo()
    for epochs, name in ((2, "best.safetensors"), (4, "student.safetensors")):
        train(make_recipe(limit=100, epochs=epochs), tmp_path / name, device=CPU)
        want = (tmp_path / name / "student.safetensors").read_bytes()
        assert (tmp_path / "o" / name).read_bytes() == want, "the best is kept beside the last"


def test_patience_is_counted_anew_after_each_best(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.0, 0.2, 0.0, 0.3, 0.0])
    train(make_recipe(limit=100, epochs=6, patience=2), tmp_path / "o", device=CPU)
    assert len(load_run(tmp_path / "o").metrics) == 6


def test_evaluations_may_be_rare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        train(
            make_recipe(limit=100, epochs=5, evaluate_every=2, seed=seed), tmp_path / f"r-{seed}", device=CPU
        )
    train(make_recipe(limit=100, epochs=5), tmp_path / "all", device=CPU)
    lines = load_run(tmp_path / "r-0").metrics
    assert ["evaluation" in line for line in lines] == [False, True, False, True, True]
    assert all(line["train"]["loss"] > 0 for line in lines)
    each = load_run(tmp_path / "all").metrics
    assert [line["train"] for line in lines] == [line["train"] for line in each], "a look changes nothing"
    assert lines[3]["evaluation"] == each[3]["evaluation"]
    assert json.loads(call("eval", "r-0", "--json"))["accuracy"] == lines[-1]["evaluation"]["accuracy"]
    told = json.loads(call("compare", "r-0", "r-1", "all", "--json", "--plot", "p.svg"))
    assert [group["runs"] for group in told] == [2, 1]
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_patience_counts_evaluations(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, 0.4, 0.3, 0.9])
    train(make_recipe(limit=50, epochs=20, evaluate_every=3, patience=2), tmp_path / "o", device=CPU)
    assert load_run(tmp_path / "o").metrics[-1]["epoch"] == 8


FLAGS = {
    "--optimizer adamw": ("optimizer.name", "adamw"),
    "--lr 0.01": ("optimizer.lr", 0.01),
    "--lr-schedule cosine": ("optimizer.schedule.shape", "cosine"),
    "--lr-schedule step --milestones 1,2": ("optimizer.schedule.milestones", (1, 2)),
    "--warmup-epochs 0.5": ("optimizer.schedule.warmup_epochs", 0.5),
    "--momentum 0.5": ("optimizer.momentum", 0.5),
    "--weight-decay 0.1": ("optimizer.weight_decay", 0.1),
    "--clip 2": ("optimizer.clip", 2.0),
    "--ema 0.9": ("optimizer.ema", 0.9),
    "--accumulate 2": ("accumulate", 2),
    "--patience 3": ("patience", 3),
    "--evaluate-every 2": ("evaluate_every", 2),
    "--views 3 --view-order shuffled": ("view_order", "shuffled"),
    "--precision bfloat16": ("precision", "bfloat16"),
    "--channels-last": ("channels_last", True),
    "--deterministic": ("deterministic", True),
    "--compile": ("compile", True),
    "--label-smoothing 0.1": ("objective.label_smoothing", 0.1),
    "--hard-weight 0.5": ("objective.hard_weight", 0.5),
    "--set optimizer.betas=[0.8,0.9]": ("optimizer.betas", (0.8, 0.9)),
    "--set optimizer.nesterov=false": ("optimizer.nesterov", False),
    "--set optimizer.schedule.end=0.1": ("optimizer.schedule.end", 0.1),
}


def test_each_flag_lands_in_the_recipe(tmp_path, monkeypatch):
    given = []

    def spied(recipe, out, **how):
        given.append((recipe, how))

    monkeypatch.setattr("coursepack.distill.runs.train.train", spied)
    monkeypatch.setattr("coursepack.distill.runs.folder.load_runs", lambda _: [])
    words = ("train", "--student", "digits-small", "--source", "digits", "--view", "digits", "--out", "new")
    call(*words)
    plain, how = given.pop()
    assert (how["resume"], how["threads"], how["checkpoint_seconds"]) == (False, None, 60.0)
    for flag, (place, want) in FLAGS.items():
        call(*words, *flag.split())
        recipe, _ = given.pop()
        value, default = recipe, plain
        for part in place.split("."):
            value, default = getattr(value, part), getattr(default, part)
        assert value == want, flag
        assert default != want, flag
    call(*words, "--resume", "--threads", 3, "--checkpoint-seconds", 1.5)
    _, how = given.pop()
    assert (how["resume"], how["threads"], how["checkpoint_seconds"]) == (True, 3, 1.5)


def test_the_command_says_how_many_epochs_it_took(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, 0.4])
    said = call("train", "--student", "digits-small", "--source", "digits", "--view", "digits", "--limit", 50,
                "--epochs", 7, "--patience", 1, "--out", tmp_path / "o")  # fmt: skip
    assert said.endswith("accuracy 40.00%, NLL 1.000 on digits:test after 2 epochs\n")


def test_what_a_run_is_evaluated_on_is_spelled_out(tmp_path):
    """A source's first split is the one to train on: a recipe that names none says which it means."""
    values = {"student": "digits-small", "source": "digits", "view": "digits"}
    assert resolve_recipe(values | {"evaluation": "digits"}, "here").evaluation == "digits:train"
    assert resolve_recipe(dict(values), "here").evaluation == "digits:test"


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("amtml", {"fusion": {"joint_epochs": 3}}),
        ("best", {"fusion": {"teacher": 0}}),
        ("dtd-flsw", {"dynamic_temperature": {"kind": "flsw", "lowest": 5.0}}),
    ],
)
def test_numbers_are_judged_beside_those_of_their_method(stores, method, objective):
    values = {"student": "digits-small", "stores": [str(stores[0])], "method": method}
    recipe = resolve_recipe({**values, "objective": objective}, "here")
    assert recipe.objective == resolve_objective(method, objective, "here", classes=10)


def test_a_full_disk_is_told_with_the_file_that_did_not_fit(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "o", overwrite=False, resume=False)
    folder.begin(make_recipe(), {}, build_network("digits-small", 10), overwrite=False)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    writes = {
        "metrics.jsonl": lambda: folder.log({"epoch": 0}),
        "best.safetensors": lambda: folder.keep_best(build_network("digits-small", 10)),
    }
    for name, write in writes.items():
        with pytest.raises(OSError, match="No space left on device") as error:
            write()
        assert error.value.filename == str(tmp_path / "o" / name)
    folder.close(keep=True)
