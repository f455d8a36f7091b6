"""Chains of stages: killed in every stage and run again, skipped, changed and redone."""

import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import CPU, write_store, write_teacher
from click.testing import CliRunner
from helpers import store_files
from moments import at_rename, die, with_path
from spawned import fork_stages, run

from coursepack.canonical import canonical_json
from coursepack.config import write_yaml
from coursepack.data import open_source
from coursepack.data.store import load_manifest
from coursepack.distill.cli import main as distill
from coursepack.distill.recipe import load_recipe
from coursepack.distill.runs.chain.file import PrecomputeConfig
from coursepack.distill.runs.chain.plan import plan_chain
from coursepack.distill.runs.folder import load_run
from coursepack.distill.training.evaluate import evaluate_ensemble
from coursepack.models import build_network, load_teacher
from coursepack.models.run_specs import checkpoint_file
from coursepack.models.weights import weights_fingerprint
from coursepack.precompute.teachers import Teacher, TeachersFile

CHAIN = """
base: {source: digits:train, view: digits, epochs: 2, limit: 80, batch_size: 40, optimizer: {lr: 0.1}}
stages:
  - {name: teacher, train: {student: digits-small}}
  - {name: targets, precompute: {teacher: stage:teacher, views: 2, block_rows: 500}}
  - {name: student, train: {student: digits-small, stores: [stage:targets], method: born-again, seed: 1}}
  - {name: both, ensemble: {runs: [stage:teacher, stage:student]}}
"""
NAMES = ("teacher", "targets", "student", "both")
WORDS = ("chain", "chain.yaml", "--out", "out", "--device", "cpu", "--checkpoint-seconds", "0")
SITE = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from moments import at_rename

def act():
    os.kill(os.getppid(), signal.SIGKILL)
    {then}

at_rename(1, act, {name!r})
"""


def chain(*words, file="chain.yaml"):
    """Run a chain of this folder in this process."""
    return CliRunner().invoke(distill, ["chain", file, "--out", "out", "--device", "cpu", *words])


def decisions(result):
    """What was done with each stage, by its name."""
    found = re.findall(r"^stage \d+ of \d+, (\w+): (.*)$", result.stderr, re.M)
    assert len(found) == len(NAMES)
    return dict(found)


def listing(folder):
    """Every file with what changes when it is written to, but for the processes that wrote to a store."""
    facts = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        str(path): (fact.st_ino, fact.st_mtime_ns) for path, fact in facts.items() if "runs" not in path.parts
    }


def content(out):
    """Bytes of everything in a chain's folder, and the metrics of its runs, which also hold seconds."""
    runs = [folder for folder in out.iterdir() if (folder / "recipe.yaml").is_file()]
    metrics = {run.name: [{**line, "seconds": 0} for line in load_run(run).metrics] for run in runs}
    files = {path: data for path, data in store_files(out).items() if "/runs/" not in path}
    return {path: data for path, data in files.items() if not path.endswith("metrics.jsonl")}, metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a chain that ran once, and what it printed."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("chain.yaml").write_text(CHAIN)
        fork_stages(patch)
        result = chain(*WORDS[6:])
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Fork the stages of chains that run in this process; those above and those killed are started."""
    fork_stages(monkeypatch)


@pytest.fixture
def work(finished, tmp_path, monkeypatch):
    """A copy of that folder, to work in."""
    shutil.copytree(finished[0], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def changed(old, new):
    """Write the chain file with a change."""
    assert old in CHAIN
    Path("chain.yaml").write_text(CHAIN.replace(old, new))


# Killed and run again.


def site(folder, name, then):
    """A folder whose `sitecustomize` kills a process's parent, and does more, before it renames a file."""
    folder.mkdir()
    tests = str(Path(__file__).parent)
    (folder / "sitecustomize.py").write_text(SITE.format(tests=tests, name=name, then=then))
    return folder


def test_a_chain_killed_in_every_stage_gives_the_same_bytes_and_does_nothing_twice(
    finished, tmp_path, monkeypatch
):
    once = content(finished[0] / "out")
    monkeypatch.chdir(finished[0])  # runs record the paths of their stores
    shutil.move("out", tmp_path / "once")
    out = finished[0] / "out"
    moments = (
        partial(at_rename, 2, die, "checkpoint.pt"),
        partial(at_rename, 1, die, "teacher.json"),
        partial(with_path, site(tmp_path / "both", "c.0.1.0", "os.kill(os.getpid(), signal.SIGKILL)")),
        partial(with_path, site(tmp_path / "parent", "c.0.2.0", "time.sleep(300)")),
        partial(at_rename, 1, die, "targets.json"),
        partial(at_rename, 3, die, "checkpoint.pt"),
        partial(at_rename, 1, die, "student.safetensors"),
        partial(at_rename, 2, die, "both.json"),
    )
    kept = {}
    try:
        for number, moment in enumerate(moments):
            killed = run("distill", *WORDS, before=moment)
            assert killed.returncode == -signal.SIGKILL, (number, killed.stderr)
            if number in (2, 3):
                assert len(list(out.glob("targets.zarr/blocks/*.json"))) == number - 1
            now = listing(out)
            results = ("student.safetensors", ".zarr/logits/values/c.")
            done = {path: facts for path, facts in now.items() if any(name in path for name in results)}
            assert {path: done.get(path) for path in kept} == kept, "something was done twice"
            kept = {path: facts for path, facts in done.items() if not path.endswith(".partial")}
        last = run("distill", *WORDS)
        assert last.returncode == 0, last.stderr
        assert list(decisions(last).values()) == ["finished and unchanged, skipped"] * 3 + [
            "ensemble, continued"
        ]
        assert last.stdout == finished[1].stdout
        assert content(out) == once
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(tmp_path / "once", "out")


def test_a_finished_chain_is_skipped(work, finished):
    before = listing(work)
    result = chain()
    assert result.exit_code == 0, result.output
    assert set(decisions(result).values()) == {"finished and unchanged, skipped"}
    assert result.stdout == finished[1].stdout
    assert listing(work) == before


def test_the_table_has_accuracies_and_their_differences_from_the_first(work):
    rows = json.loads(chain("--json").stdout)
    assert [row["stage"] for row in rows] == ["teacher", "student", "both"]
    finals = [load_run(Path("out", name)).metrics[-1]["evaluation"] for name in ("teacher", "student")]
    assert [row["accuracy"] for row in rows[:2]] == [final["accuracy"] for final in finals]
    table = chain().stdout
    for row in rows[1:]:
        points = 100 * (row["accuracy"] - rows[0]["accuracy"])
        assert re.search(rf"{row['stage']} .*{row['accuracy']:.2%} .*{re.escape(f'{points:+.2f}')} ", table)


# Changed and redone.


def test_a_changed_stage_is_refused_with_its_differences_and_redone_on_request(work, monkeypatch):
    monkeypatch.setattr("coursepack.distill.runs.chain.run.SHORT_SECONDS", 0)
    changed("seed: 1", "seed: 2")
    before = listing(work)
    result = chain()
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: stage 'student' was run with other values.\n"
        "  recipe.seed   finished with: 1   now: 2\n"
        "Run it again with --redo student, restore the values, or choose another --out.\n"
    )
    assert listing(work) == before
    result = chain("--redo", "student")
    assert result.exit_code == 0, result.output
    assert re.findall(r"^.* left$", result.stderr, re.M)[-1].startswith("3 of 4 stages finished, about ")
    assert list(decisions(result).values()) == [
        *["finished and unchanged, skipped"] * 2, "train, again", "ensemble, again"
    ]  # fmt: skip
    assert load_run(Path("out/student")).recipe.seed == 2
    assert set(decisions(chain()).values()) == {"finished and unchanged, skipped"}


def test_stages_that_read_a_redone_stage_are_redone_only_if_its_result_changes(work):
    result = chain("--redo", "teacher")
    assert result.exit_code == 0, result.output
    assert list(decisions(result).values()) == ["train, again", *["finished and unchanged, skipped"] * 3]
    changed("{student: digits-small}", "{student: digits-small, seed: 5}")
    assert "--redo teacher" in chain().stderr
    result = chain("--redo", "teacher")
    assert result.exit_code == 0, result.output
    assert list(decisions(result).values()) == [
        f"{kind}, again" for kind in ("train", "precompute", "train", "ensemble")
    ]


def test_all_changed_stages_are_named_at_once(work):
    changed("views: 2", "views: 3")
    Path("chain.yaml").write_text(Path("chain.yaml").read_text().replace("seed: 1", "seed: 2"))
    told = chain().stderr
    assert "stage 'targets' was run with other values.\n  recipe.views   finished with: 2   now: 3\n" in told
    assert "stage 'student' was run with other values.\n  recipe.seed   finished with: 1   now: 2\n" in told


def test_results_that_were_replaced_are_noticed(work):
    shutil.copy("out/student/student.safetensors", "out/teacher/student.safetensors")
    told = chain().stderr
    assert re.search(
        r"stage 'teacher' was run with other values.\n  output.weights   finished with: \w+ ", told
    )


def test_results_that_were_removed_are_made_again(work, finished):
    shutil.rmtree("out/targets.zarr")
    result = chain()
    assert result.exit_code == 0, result.output
    assert decisions(result) == dict.fromkeys(NAMES, "finished and unchanged, skipped") | {
        "targets": "precompute"
    }
    first = load_manifest(finished[0] / "out" / "targets.zarr").fingerprint
    assert load_manifest(Path("out/targets.zarr")).fingerprint == first


def test_a_folder_of_something_else_is_refused(work):
    Path("out/student.json").unlink()
    told = chain().stderr
    assert told == (
        "Error: stage 'student': 'out/student' exists, but is not of this chain: remove it, or choose "
        "another --out\n"
    )


def test_a_damaged_record_is_refused(work):
    Path("out/student.json").write_text('{"stage": "student"}')
    assert re.search(
        r"stage 'student': out/student.json is not valid:\n  identity: is missing\n", chain().stderr
    )


def test_a_stage_that_fails_says_which_and_how_to_go_on(work):
    Path("out/targets.json").unlink()
    shutil.rmtree("out/targets.zarr")
    Path("out/teacher/network.yaml").write_text("spec: digits-cnn\n")
    result = chain()
    assert result.exit_code == 1
    assert (
        "stage 'targets': `precompute run out/targets.teacher.yaml` ended with status 1, see what it "
        "printed: once the cause is mended, the same command continues the chain\n"
    ) in result.stderr


def test_redo_names_a_stage(work):
    told = chain("--redo", "studnet").stderr
    assert told.startswith("Error: unknown stage 'studnet'. Did you mean 'student'? Known: teacher, targets,")


def test_a_chain_of_ranks_is_refused(work, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a chain runs in one process: leave torchrun out" in chain().stderr


# Its parts.


def test_the_manifest_that_is_planned_is_the_one_that_is_written(work):
    planned = plan_chain(Path("chain.yaml"), Path("out"), device=CPU)[1].store.manifest
    written = load_manifest(Path("out/targets.zarr"))
    assert planned.arrays == written.arrays
    assert {name: table.shape for name, table in planned.tables.items()} == {
        name: table.shape for name, table in written.tables.items()
    }
    for name in ("view", "source", "precision"):
        assert canonical_json(planned.identity[name]) == canonical_json(written.identity[name])
    teacher = written.identity["teacher"] | {"weights": ""}
    assert canonical_json(planned.identity["teacher"]) == canonical_json(teacher)
    assert (planned.samples, planned.views, planned.block_rows) == (1442, 2, 500)


def test_a_stage_has_the_fields_of_a_file_of_teachers():
    fields = (Teacher.model_fields.keys() | TeachersFile.model_fields.keys()) - {"store", "teachers"}
    assert PrecomputeConfig.model_fields.keys() == fields
    for name in fields:
        field = Teacher.model_fields.get(name) or TeachersFile.model_fields[name]
        own = PrecomputeConfig.model_fields[name]
        if name not in ("source", "view"):  # defaults to the teacher's stage
            assert repr((own.annotation, own.default)) == repr((field.annotation, field.default)), name


def test_the_file_of_teachers_that_a_stage_writes_is_one(work):
    values = load_recipe(Path("out/targets.teacher.yaml"))
    assert TeachersFile.model_validate(values).teachers[0].teacher == "run:out/teacher"
    assert load_recipe(Path("out/targets.view.yaml"))["ops"]


@pytest.mark.parametrize("combine", ["probs", "logits"])
def test_an_ensemble_is_the_average_of_its_members(combine):
    source = open_source("digits:test")
    networks = [build_network("digits-small", 10, seed=seed) for seed in (1, 2, 3)]
    told = evaluate_ensemble(networks, source, CPU, combine=combine)
    images = torch.from_numpy(source.images)
    with torch.inference_mode():
        logits = torch.stack([each.module(each.preprocessing(images)).double() for each in networks])
    mean = logits.softmax(2).mean(0).log() if combine == "probs" else logits.mean(0)
    labels = torch.from_numpy(source.labels)
    assert told["accuracy"] == pytest.approx((mean.argmax(1) == labels).double().mean().item())
    assert told["nll"] == pytest.approx(F.cross_entropy(mean, labels).item(), rel=1e-5)


def test_the_ensemble_of_a_chain_is_evaluated_on_the_runs_data(work):
    row = json.loads(chain("--json").stdout)[-1]
    source = open_source("digits:test")
    members = [load_teacher(f"run:out/{name}", source.class_names) for name in ("teacher", "student")]
    told = evaluate_ensemble(members, source, CPU)
    assert {name: row[name] for name in told} == told
    assert row["description"] == "mean probs of teacher, student"


def test_a_chain_goes_on_from_stores_and_runs_that_are_there(tmp_path, monkeypatch):
    """From a run and a store of somebody else's, whose changes are noticed."""
    monkeypatch.chdir(tmp_path)
    write_store(Path("digits.zarr"), write_teacher(Path("mlp"), seed=1))
    own = {"teacher": "run:mlp", "source": "digits", "view": "digits", "views": 1}
    taught = {"student": "digits-small", "epochs": 1, "limit": 40, "stores": ["stage:own", "digits.zarr"]}
    stages = [{"name": "own", "precompute": own}, {"name": "student", "train": taught}]
    Path("c.yaml").write_text(write_yaml({"stages": stages}))
    result = chain(file="c.yaml")
    assert result.exit_code == 0, result.output
    assert load_run(Path("out/student")).recipe.stores == ("out/own.zarr", "digits.zarr")
    shutil.rmtree("digits.zarr")
    write_store(Path("digits.zarr"), write_teacher(Path("other"), seed=2), views=2)
    assert re.search(
        r"stage 'student' was run with other values.\n  reads.stores.digits.zarr.fingerprint   finished with",
        chain(file="c.yaml").stderr,
    )


PATH = """
stages:
  - name: teacher
    train: {student: digits-small, source: digits, view: digits, epochs: 3, limit: 40, keep_checkpoints: 1}
  - {name: first, precompute: {teacher: stage:teacher@1, views: 1}}
  - {name: last, precompute: {teacher: stage:teacher, views: 1}}
  - name: student
    train: {student: digits-small, epochs: 2, stores: [stage:first, stage:last], method: pro-kd}
"""


def test_a_chain_follows_the_checkpoints_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("path.yaml").write_text(PATH)
    result = chain(file="path.yaml")
    assert result.exit_code == 0, result.output
    classes = open_source("digits").class_names
    for store, spec in {"first": "run:out/teacher@1", "last": "run:out/teacher@3"}.items():
        written = load_manifest(Path("out", f"{store}.zarr")).identity["teacher"]["weights"]
        assert written == weights_fingerprint(load_teacher(spec, classes).module)
    before = listing(tmp_path)
    assert chain(file="path.yaml").stdout == result.stdout
    assert listing(tmp_path) == before
    first, second = (checkpoint_file(Path("out/teacher"), epoch) for epoch in (1, 2))
    shutil.copy(second, first)
    told = chain(file="path.yaml").stderr
    assert re.search(r"'teacher' was run with other values.\n  output.checkpoints.1.weights   finished", told)
    # What was read of the run before is the same after a repetition.
    again = chain("--redo", "teacher", file="path.yaml")
    assert again.exit_code == 0, again.output
    assert "first: finished and unchanged, skipped" in again.stderr
    assert again.stdout == result.stdout
