"""The command `precompute`: what it prints, what it refuses, and its exit status."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from builders import write_teacher
from click.testing import CliRunner
from helpers import make_job, rewrite_manifest, store_files
from safetensors.torch import load_file, save_file

from coursepack.data.store import StoreWriter, load_manifest
from coursepack.data.store.owners import Part
from coursepack.models.build import WEIGHTS_FILE
from coursepack.precompute.cli import main

EVERYTHING = np.arange(1442)


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers[1]


@pytest.fixture(scope="module")
def written(cnn_store):
    return cnn_store


@pytest.fixture
def command(teacher):
    """Run the command in this process; gives its exit status, stdout and stderr."""

    def run(name, *arguments, **changes):
        options = {"teacher": f"run:{teacher}", "source": "digits", "view": "digits", "views": 2} | changes
        flags = (
            [f"--{key.replace('_', '-')}={value}" for key, value in options.items()] if name == "run" else []
        )
        return CliRunner().invoke(main, [name, *flags, *map(str, arguments)])

    return run


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"view": "none"}, "view.recipe.reference_size store: 8 recipe: 32"),
        ({"view_seed": 3}, "view.recipe.seed store: 0 recipe: 3"),
        ({"source": "digits:test"}, "source.name store: digits:train recipe: digits:test"),
        ({"encoding": "float32"}, "encoding.name store: float16 recipe: float32"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(written, command, changes, line):
    files = store_files(written)
    result = command("run", "--store", written, **changes)
    assert result.exit_code == 1
    assert line in [" ".join(text.split()) for text in result.stderr.splitlines()]
    assert "Use another --store" in result.stderr
    assert store_files(written) == files


def test_weights_that_are_not_finite_are_refused_by_the_command(tmp_path, teacher, command):
    sick = tmp_path / "sick"
    shutil.copytree(teacher, sick)
    state = load_file(sick / WEIGHTS_FILE)
    save_file({**state, "head.bias": state["head.bias"] * float("inf")}, sick / WEIGHTS_FILE)
    result = command("run", "--store", tmp_path / "s.zarr", teacher=f"run:{sick}")
    assert result.exit_code == 1
    assert (
        "Error: teacher 'digits-cnn' gives logits that are not finite for 256 samples of a batch (0, 1, 2, 3"
        in (result.stderr)
    )


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "-1/2", "0/0", "/", "1/2/3", ""])
def test_part_that_is_none_is_refused(tmp_path, command, part):
    result = command("run", "--store", tmp_path / "s.zarr", part=part)
    assert result.exit_code == 2
    assert "is not I/COUNT with 0 <= I < COUNT, as in 0/2 and 1/2" in result.stderr
    assert not (tmp_path / "s.zarr").exists()


def test_teacher_of_other_classes_is_refused_and_nothing_is_written(tmp_path, command):
    other = write_teacher(tmp_path / "seven", "digits-cnn", classes=7)
    result = command("run", "--store", tmp_path / "s.zarr", teacher=f"run:{other}")
    assert result.exit_code == 1
    assert "has 7 classes, but the source has 10 (0, 1, 2, ...)" in result.stderr
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tap": "hiden"}, "unknown layer 'hiden'. Did you mean 'hidden'?"),
        ({"source": "digit"}, "unknown source 'digit'. Did you mean 'digits'?"),
        ({"view": "digit"}, "unknown view 'digit'. Did you mean 'digits'?"),
        ({"size": 16}, "teacher 'digits-cnn' cannot take views of 16 x 16 pixels"),
        ({"teacher": "run:nowhere"}, "there is no run at 'nowhere'"),
        ({"teacher": "digits-cnn"}, "teacher 'digits-cnn' has no weights: give --weights FILE"),
    ],
)
def test_what_does_not_exist_is_refused_and_nothing_is_written(tmp_path, command, changes, text):
    result = command("run", "--store", tmp_path / "s.zarr", **changes)
    assert (result.exit_code, text in result.stderr, "Traceback" in result.stderr) == (1, True, False)
    assert not (tmp_path / "s.zarr").exists()


def test_run_tells_what_there_is(tmp_path, command):
    result = command("run", "--store", tmp_path / "s.zarr", views=1, tap="hidden")
    assert result.exit_code == 0, result.stderr
    for text in (
        "views committed",
        "1 of 1",
        "features/hidden",
        "64, float16",
        "digits:train, 1,442 samples",
    ):
        assert text in result.stdout


def test_status(store, command):
    result = command("status", "--store", store, "--json")
    facts = json.loads(result.stdout)
    manifest = load_manifest(store)
    assert result.exit_code == 0
    assert (facts["samples"], facts["classes"], facts["views"], facts["block_rows"]) == (1442, 10, 2, 500)
    assert (facts["committed_views"], facts["blocks_done_besides"], facts["writers"]) == (
        [0, 1],
        0,
        [],
    )
    assert facts["fingerprint"] == manifest.fingerprint
    assert facts["accuracy_per_view"]["1"] == manifest.view_records["1"]["sums"]["correct"] / 1442
    assert facts["bytes"] == sum((store / key).stat().st_size for key in manifest.files)
    assert "2 of 2" in command("status", "--store", store).stdout
    with StoreWriter(store, make_job(store, manifest_teacher(store), views=3).plan(), Part(1, 4)):
        facts = json.loads(command("status", "--store", store, "--json").stdout)
        assert [(run["part_index"], run["part_count"]) for run in facts["writers"]] == [(1, 4)]
        assert "part 1/4" in command("status", "--store", store).stdout


def manifest_teacher(store):
    return load_manifest(store).origin["weights_file"].removesuffix(f"/{WEIGHTS_FILE}")


def test_verify(store, command):
    assert json.loads(command("verify", "--store", store, "--json").stdout)["problems"] == []
    sound = command("verify", "--store", store)
    assert (sound.exit_code, "sound, 9 files" in sound.stdout) == (0, True)
    (store / "logits/values/c.1.2.0").unlink()
    broken = command("verify", "--store", store)
    assert broken.exit_code == 1
    assert broken.stdout.splitlines()[0] == "logits/values/c.1.2.0: missing"
    assert "1 problems, 9 files" in broken.stdout
    report = command("verify", "--store", store, "--json")
    assert report.exit_code == 1
    assert json.loads(report.stdout)["problems"] == ["logits/values/c.1.2.0: missing"]


def test_names_that_would_command_the_terminal_are_shown_as_text(store, tmp_path, command):
    shutil.copytree(store, tmp_path / "odd.zarr")

    def rename(values):
        values["identity"]["teacher"]["network"] = "\x1b[2Jmlp\x07"
        values["origin"]["weights_file"] = "\x9b31mweights"

    rewrite_manifest(tmp_path / "odd.zarr", rename)
    for words in (("status", "--store", tmp_path / "odd.zarr"), ("inspect", tmp_path / "odd.zarr")):
        result = command(*words)
        assert result.exit_code == 0
        assert r"\x1b[2Jmlp\x07" in result.stdout
        assert not set("\x1b\x07\x9b") & set(result.stdout)


@pytest.mark.parametrize("name", ["status", "inspect"])
def test_a_view_without_the_sums_that_are_shown_is_said_so(store, tmp_path, command, name):
    path = tmp_path / "odd.zarr"
    shutil.copytree(store, path)
    rewrite_manifest(path, lambda values: values["view_records"]["1"]["sums"].pop("correct"))
    result = command(*(("status", "--store", path) if name == "status" else ("inspect", path)))
    assert result.exit_code == 1
    assert f"the manifest has no sum of 'correct' for view 1 of store '{path}'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["status", "verify"])
def test_commands_without_a_store(tmp_path, command, name):
    result = command(name, "--store", tmp_path / "none.zarr")
    assert result.exit_code == 1
    assert "there is no store at" in result.stderr
    assert "Traceback" not in result.stderr
