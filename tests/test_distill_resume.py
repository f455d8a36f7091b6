"""Runs that are interrupted and resumed: to the last bit, from any moment, or refused with nothing lost."""

import os
import re
import shutil
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe, write_store, write_teacher
from moments import at_rename, die
from spawned import DROPPING, run
from stopping import RUN, Stopped, interrupted

from coursepack.config import write_yaml
from coursepack.data.store import load_manifest
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.runs.folder import load_run, load_runs
from coursepack.distill.runs.train import train
from coursepack.distill.training.checkpoint import CHECKPOINT_FILE, load_checkpoint
from coursepack.errors import RunError
from coursepack.models.networks import NETWORKS

TRAIN = sys.modules["coursepack.distill.runs.train"]  # the package's `train` is the function
TEACHER_STORES, TARGETS = (
    sys.modules[f"coursepack.distill.{name}"] for name in ("targets.teacher_stores", "targets.stores")
)
WEIGHTS = ("student.safetensors", "best.safetensors")
SAME = (*WEIGHTS, "recipe.yaml", "provenance.json", "network.yaml")
STUDENT = {"limit": 150, "batch_size": 32, "epochs": 4}
STEPS = 5
ADAMW = {"name": "adamw", "lr": 0.01, "schedule": {"shape": "cosine", "warmup_epochs": 1}, "ema": 0.9}
PHASES = {
    "fusion": {"epochs": [1, 2], "label_epochs": 1},
    "temperature": {"shape": "warmup", "start": 4.0, "epochs": 3},
}
ONE_CYCLE = {"lr": 0.02, "clip": 1.0, "schedule": {"shape": "one_cycle"}}


@pytest.fixture(autouse=True)
def dropping(monkeypatch):
    """A student that draws."""
    monkeypatch.setitem(NETWORKS, "dropping", DROPPING)


def recipes(stores, tapped, mapped):
    """Runs with all that has a state."""
    hints = {"pairs": [{"teacher": 0, "tap": "conv2", "layer": "conv2"}], "weight": 0.1}
    joint = {"fusion": {"joint_epochs": 2}, "terms": {"hint": hints}}
    pair = {"pairs": hints["pairs"]}
    adapted = {
        "crd": {**pair, "negatives": 64, "dim": 8},
        "ft": {**pair, "paraphraser_epochs": 2, "weight": 1.0},
        "vid": pair,
        "ab": {**pair, "weight": {"shape": "step", "start": 0.003, "end": 0.0, "epochs": 3}},
        "regressor": {"term": "hint", "adapter": "conv-bn-relu", **pair},
    }
    drawing = {"student": "dropping", "optimizer": ADAMW, "accumulate": 2, "view_order": "shuffled"}
    return {
        "dropout": make_recipe(stores[:2], **STUDENT, **drawing),
        "hints": make_recipe(
            tapped[1:2], method="amtml-hints", objective=joint, student="digits-cnn", precision="float16",
            optimizer=ONE_CYCLE, **STUDENT,
        ),
        "adapters": make_recipe(
            tapped[1:2], method="crd", objective={"terms": adapted}, student="digits-cnn", **STUDENT,
            optimizer={"lr": 0.01},
        ),
        "reviewkd": make_recipe([mapped], method="reviewkd", student="digits-cnn", **STUDENT),
        "simkd": make_recipe([mapped], method="simkd", student="digits-cnn", optimizer=ADAMW, **STUDENT),
        "windowed": make_recipe(stores[:2], reading="windowed", views_per_load=2, patience=1, **STUDENT),
        "random": make_recipe(stores, method="random", evaluate_every=3, **STUDENT),
        "sequence": make_recipe(
            stores[:2], method="pro-kd", objective=PHASES, reading="windowed", **STUDENT
        ),
        "dtd": make_recipe(stores, method="ka-dtd", channels_last=True, student="digits-resnet", **STUDENT),
        "peers": make_recipe(
            stores[:1], method="okddip", student="dropping", optimizer=ADAMW, accumulate=2,
            objective={"soft_weight": 0.5}, **STUDENT,
        ),
        "afd": make_recipe(method="afd", student="digits-cnn", **STUDENT),
        "gated": make_recipe(
            stores[:2], method="amtml-gated", objective={"fusion": {"student_gradient": True}}, accumulate=2,
            **STUDENT,
        ),
    }  # fmt: skip


NAMES = (
    *("dropout", "hints", "adapters", "reviewkd", "simkd", "windowed", "random", "sequence", "dtd"),
    *("peers", "afd", "gated"),
)


def told(run):
    """Metrics per epoch of every student, but for the time they took."""
    return [{**line, "seconds": None} for each in load_runs(run) for line in each.metrics]


def files(run):
    """Every file of a run by its path."""
    paths = [path for path in run.rglob("*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def assert_same(run, once):
    assert told(run) == told(once)
    found, wanted = files(run), files(once)
    assert found.keys() == wanted.keys()
    assert {name.rpartition("/")[2] for name in found} >= set(SAME)
    for name in found:
        if name.endswith(SAME):
            assert found[name] == wanted[name], name


OTHERS = ("reviewkd", "simkd", "dtd", "afd", "gated")
"""Runs with a state of the same kinds as those before them."""
RUNS = [pytest.param(name, marks=pytest.mark.integration if name in OTHERS else ()) for name in NAMES]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_to_the_last_bit(tmp_path, monkeypatch, stores, tapped, mapped_store, name):
    """Stopped early, in the middle, between two epochs, and after the last step."""
    if name == "windowed":
        monkeypatch.setattr(TARGETS, "WINDOW_ROWS", 32)
        monkeypatch.setattr(TARGETS, "WINDOW_CHUNKS", 1)
    recipe = recipes(stores, tapped, mapped_store)[name]
    once, out = tmp_path / "once", tmp_path / "o"
    train(recipe, once, device=CPU)
    epochs, steps = len(load_runs(once)[-1].metrics), -(-150 // (32 // recipe.views_per_load))
    stops = sorted({1, steps + 2, 2 * steps, epochs * steps})
    positions = []
    for before, stop in zip([0, *stops], stops, strict=False):
        interrupted(monkeypatch, recipe, out, saves=stop - before)
        assert not (out / "student.safetensors").exists()
        position = load_checkpoint(out, CPU)["position"]
        position = position[0] if recipe.peers else position
        positions.append(position["epoch"] * steps + position["batches"])
        torch.rand(7)  # what else is drawn in a process is no matter
    assert positions == stops
    train(recipe, out, device=CPU, resume=True)
    assert_same(out, once)
    assert epochs == (2 if name == "windowed" else 4), "patience is counted across interruptions"


def listing(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def refused(recipe, out, text, **how):
    """A resumption that is refused, and leaves everything as it is."""
    before = listing(out)
    with pytest.raises(RunError, match=text):
        train(recipe, out, device=CPU, resume=True, **how)
    assert listing(out) == before


def test_another_recipe_is_refused(tmp_path, monkeypatch):
    recipe = make_recipe(**STUDENT)
    other = make_recipe(**STUDENT, optimizer={"lr": 0.01})
    text = (
        r"run '.*o' cannot be resumed, since it was started with other values\.\n"
        r"  optimizer\.lr +started with: 0\.05 +now: 0\.01\nResume with the values it was started with, or"
    )
    interrupted(monkeypatch, recipe, tmp_path / "o", saves=3)
    refused(other, tmp_path / "o", text)
    train(recipe, tmp_path / "o", device=CPU, resume=True)
    refused(other, tmp_path / "o", text)


def test_another_recipe_is_refused_before_the_first_checkpoint_too(tmp_path, monkeypatch):
    out = tmp_path / "o"
    evaluate, done = RUN.evaluate, []

    def once(*arguments, **named):
        if done:
            raise Stopped
        done.append(1)
        return evaluate(*arguments, **named)

    monkeypatch.setattr(RUN, "evaluate", once)
    with pytest.raises(Stopped):
        train(make_recipe(**STUDENT), out, device=CPU)
    assert not (out / CHECKPOINT_FILE).exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    refused(make_recipe(**STUDENT, seed=1), out, r"seed +started with: 0 +now: 1")
    monkeypatch.undo()
    (out / "notes.txt").write_text("mine")
    train(make_recipe(**STUDENT), out, device=CPU, resume=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert [line["epoch"] for line in load_run(out).metrics] == [0, 1, 2, 3]


def test_another_store_is_refused(tmp_path, monkeypatch):
    store, out = tmp_path / "s.zarr", tmp_path / "o"
    write_store(store, write_teacher(tmp_path / "one", seed=1))
    recipe = make_recipe([store], **STUDENT)
    interrupted(monkeypatch, recipe, out, saves=7)
    old = shutil.move(store, tmp_path / "old.zarr")
    write_store(store, write_teacher(tmp_path / "two", seed=2))
    refused(recipe, out, r"stores\[0\]\.fingerprint +started with: \"?\w+")
    shutil.rmtree(store)
    shutil.move(old, store)
    train(recipe, out, device=CPU, resume=True)


@pytest.mark.parametrize("views", [None, 2])
def test_more_views_by_then_are_refused_if_they_would_be_taken(tmp_path, monkeypatch, views):
    store, out = tmp_path / "s.zarr", tmp_path / "o"
    teacher = write_teacher(tmp_path / "t", seed=1)
    write_store(store, teacher)
    recipe = make_recipe([store], views=views, **STUDENT)
    train(recipe, tmp_path / "once", device=CPU)
    interrupted(monkeypatch, recipe, out, saves=7)
    write_store(store, teacher, views=3)
    assert load_manifest(store).committed_views() == (0, 1, 2)
    if views is None:
        refused(recipe, out, r"views.*started with: .*now: 2")
        return
    train(recipe, out, device=CPU, resume=True)
    assert told(out) == told(tmp_path / "once")
    assert [(out / name).read_bytes() == (tmp_path / "once" / name).read_bytes() for name in WEIGHTS] == [
        1,
        1,
    ]


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    """One bit of a weight."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: b"PK\x03\x04" + bytes(100)])
def test_a_damaged_checkpoint_is_refused(tmp_path, monkeypatch, damage):
    recipe, out = make_recipe(**STUDENT), tmp_path / "o"
    interrupted(monkeypatch, recipe, out, saves=7)
    path = out / CHECKPOINT_FILE
    path.write_bytes(damage(path.read_bytes()))
    refused(recipe, out, r"checkpoint '.*checkpoint.pt' cannot be read \(.*\): train again with --overwrite")


@pytest.mark.parametrize("name", ["recipe.yaml", "provenance.json", "metrics.jsonl"])
def test_a_fifo_in_the_place_of_a_file_does_not_hang(tmp_path, monkeypatch, name):
    recipe, out = make_recipe(**STUDENT), tmp_path / "o"
    interrupted(monkeypatch, recipe, out, saves=7)
    (out / name).unlink()
    os.mkfifo(out / name)
    with pytest.raises((RunError, OSError), match=r"regular file|not a run"):
        train(recipe, out, device=CPU, resume=True)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    recipe, out = make_recipe(**STUDENT), tmp_path / "o"
    interrupted(monkeypatch, recipe, out, saves=7)
    state = load_checkpoint(out, CPU)
    torch.save({**state, "version": 99}, out / CHECKPOINT_FILE)
    refused(recipe, out, r"has version 99, expected 2: finish the run with the release that started it")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 1}, r"recipe\.seed +checkpoint: 1 +this run: 0"),
        ({"optimizer": {"lr": 0.01}}, r"recipe\.optimizer\.lr +checkpoint: 0\.01 +this run: 0\.05"),
        (
            {"objective": {"temperature": 2.0}},
            r"recipe\.objective\.temperature +checkpoint: 2\.0 +this run: 4",
        ),
        ({"batch_size": 16}, r"recipe\.batch_size +checkpoint: 16 +this run: 32"),
        ({"stores": [1]}, r"stores\[0\]\.fingerprint +checkpoint: \w+ +this run: \w+"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch, stores, change, text):
    """Everything in the folder is that of the run but the checkpoint."""
    recipe, out = make_recipe(stores[:1], **STUDENT), tmp_path / "o"
    chosen = [stores[place] for place in change.get("stores", [0])]
    fields = {**STUDENT, **{name: value for name, value in change.items() if name != "stores"}}
    interrupted(monkeypatch, recipe, out, saves=7)
    interrupted(monkeypatch, make_recipe(chosen, **fields), tmp_path / "other", saves=7)
    shutil.copy(tmp_path / "other" / CHECKPOINT_FILE, out / CHECKPOINT_FILE)
    refused(recipe, out, r"(?s)checkpoint '.*o/checkpoint.pt' belongs to another run\.\n.*" + text)


def test_a_finished_run_stays_as_it_is(tmp_path, capsys):
    recipe, out = make_recipe(**STUDENT), tmp_path / "o"
    metrics = train(recipe, out, device=CPU)
    before = listing(out)
    # A kill between the last weights and the clearing away leaves these.
    (out / CHECKPOINT_FILE).write_bytes(b"")
    (out / "checkpoint.pt.123.partial").write_bytes(b"")
    assert train(recipe, out, device=CPU, resume=True) == metrics
    assert "is finished: there is nothing to resume" in capsys.readouterr().err
    assert listing(out) == before


def test_where_nothing_is_a_run_begins(tmp_path):
    recipe = make_recipe(**STUDENT)
    train(recipe, tmp_path / "once", device=CPU)
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml.77.partial").write_bytes(b"student:")
    for name in ("new/deep", "empty", "begun"):
        train(recipe, tmp_path / name, device=CPU, resume=True)
        assert_same(tmp_path / name, tmp_path / "once")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    refused(recipe, tmp_path / "notes", "is not empty and not a run: choose another --out")


def test_what_was_done_after_the_checkpoint_is_done_again(tmp_path, monkeypatch, stores):
    recipe, out = make_recipe(stores[:1], **STUDENT), tmp_path / "o"
    train(recipe, tmp_path / "once", device=CPU)
    steps, evaluations = iter(range(1, 1000)), iter(range(3))
    evaluate = RUN.evaluate

    def three_times(*arguments, **named):
        if next(evaluations, None) is None:
            raise Stopped
        return evaluate(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(TRAIN._Interval, "is_due", lambda _: next(steps) == STEPS + 2)
        patch.setattr(RUN, "evaluate", three_times)
        with pytest.raises(Stopped):
            train(recipe, out, device=CPU)
    lines = (out / "metrics.jsonl").read_text()
    assert len(lines.splitlines()) == 3
    assert load_checkpoint(out, CPU)["position"]["epoch"] == 1
    (out / "metrics.jsonl").write_text(lines + '{"epoch": 3, "vi')
    train(recipe, out, device=CPU, resume=True)
    assert_same(out, tmp_path / "once")


def test_stores_are_read_as_when_the_run_began(tmp_path, monkeypatch, stores):
    """A window changes the order of samples; how much memory is free later must not."""
    monkeypatch.setattr(TARGETS, "WINDOW_ROWS", 32)
    monkeypatch.setattr(TARGETS, "WINDOW_CHUNKS", 1)
    recipe = make_recipe(stores[:2], **STUDENT)
    choices = iter(["windowed", "windowed"])
    monkeypatch.setattr(TEACHER_STORES, "choose_reading", lambda *_: next(choices))
    train(recipe, tmp_path / "once", device=CPU)
    interrupted(monkeypatch, recipe, tmp_path / "o", saves=7)
    train(recipe, tmp_path / "o", device=CPU, resume=True)
    assert_same(tmp_path / "o", tmp_path / "once")
    assert load_run(tmp_path / "o").recipe.reading == "auto"


def test_tensorboard_forgets_what_is_trained_again(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            written.append(("from", purge_step))

        def add_scalar(self, name, value, epoch):
            if name == "train/loss":
                written.append((epoch, value))

        def flush(self):
            written.append("flush")

        def close(self):
            pass

    fake = type(torch)("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    recipe, out = make_recipe(**STUDENT), tmp_path / "o"
    interrupted(monkeypatch, recipe, out, saves=2 * STEPS + 1, tensorboard=True)
    train(recipe, out, device=CPU, resume=True, tensorboard=True)
    losses = [line["train"]["loss"] for line in load_run(out).metrics]
    by_epoch = [entry for number, loss in enumerate(losses) for entry in ((number, loss), "flush")]
    assert written == [("from", 0), *by_epoch[:4], ("from", 2), *by_epoch[4:]]


# Real processes


def kill_and_resume(folder, recipe, *, kills, seed):
    """Train once without interruption, and once with kills; assert that both are the same."""
    (folder / "recipe.yaml").write_text(write_yaml(recipe.model_dump(mode="json")))
    out, once = folder / "o", folder / "once"
    words = ["distill", "train", folder / "recipe.yaml", "--device", "cpu", "--threads", 1]
    again = [*words, "--out", out, "--resume"]
    rng = np.random.default_rng(seed)
    whole = run(*words, "--out", once)
    assert whole.returncode == 0, whole.stderr
    # The first dies before there is a checkpoint.
    early = run(*again, before=partial(at_rename, 1, die, "best.safetensors"))
    assert early.returncode == -signal.SIGKILL, early.stderr
    assert not (out / CHECKPOINT_FILE).exists()
    said = ""
    for _ in range(kills):
        dies = partial(at_rename, int(rng.integers(2, 6)), die, CHECKPOINT_FILE)
        killed = run(*again, "--checkpoint-seconds", 0, before=dies)
        said += killed.stderr
        assert killed.returncode == -signal.SIGKILL, said
    last = run(*again)
    said += last.stderr
    assert last.returncode == 0, said
    found = re.findall(r"resuming .* in epoch (\d+) after (\d+) batches", said)
    positions = [(int(epoch), int(batches)) for epoch, batches in found]
    assert len(positions) == kills
    assert positions == sorted(set(positions)), "every process went further than the one before"
    assert_same(out, once)


@pytest.mark.parametrize("name", ["dropout", pytest.param("peers", marks=pytest.mark.integration)])
def test_killed_processes_train_the_same_students(tmp_path, stores, tapped, mapped_store, name):
    kill_and_resume(tmp_path, recipes(stores, tapped, mapped_store)[name], kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_kills(tmp_path, stores, tapped, mapped_store, name):
    recipe = recipes(stores, tapped, mapped_store)[name]
    longer = {"epochs": 12, "patience": None}
    if name == "sequence":
        phases = PHASES | {"fusion": {"epochs": [4, 4], "label_epochs": 4}}
        longer["objective"] = resolve_objective("pro-kd", phases, "here")
    recipe = recipe.model_copy(update=longer)
    kill_and_resume(tmp_path, recipe, kills=12, seed=1)
