"""Several teachers in one pass, and several ranks of torchrun: the bytes of one teacher in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import make_job, store_files
from spawned import run

from coursepack.config import write_yaml
from coursepack.data import Batch, view_recipe
from coursepack.data.store import load_manifest, verify
from coursepack.data.store.owners import Part
from coursepack.device import rank_device
from coursepack.errors import RecipeError
from coursepack.models.taps import Tap
from coursepack.precompute import run_job
from coursepack.precompute.cli import main
from coursepack.precompute.several import run_jobs

FIELDS = {"block_rows": 500, "batch_size": 100, "views": 2}
TWO = ["--standalone", "--nproc-per-node", "2"]


def jobs_of(folder, teachers, **fields):
    """A job for each teacher; the second has a tap, the third other encodings."""
    given = [{}, {"taps": (Tap(("conv2",)),)}, {"encoding": "int8"}]
    return [
        make_job(folder / f"{index}.zarr", teacher, **FIELDS | own | fields)
        for index, (teacher, own) in enumerate(zip(teachers, given, strict=False))
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teachers):
    """The files of the stores of three teachers, each written by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for job in jobs_of(folder, teachers):
        run_job(job, quiet=True)
    return [store_files(folder / f"{index}.zarr") for index in range(3)]


def assert_same(folder, alone):
    for index, expected in enumerate(alone):
        found = store_files(folder / f"{index}.zarr")
        assert found.keys() == expected.keys()
        assert [key for key in found if found[key] != expected[key]] == []
        assert verify(folder / f"{index}.zarr").problems == ()


@pytest.fixture
def rendered(monkeypatch):
    """Rows (sample, view) of every batch that is rendered."""
    rows = []
    render_all = Batch.render_all

    def watched(self, sizes):
        rows.extend(zip(self.samples.tolist(), self.views.tolist(), strict=True))
        return render_all(self, sizes)

    monkeypatch.setattr(Batch, "render_all", watched)
    return rows


@pytest.mark.parametrize("together", [1, 2])
def test_teachers_in_one_pass_share_what_is_rendered(tmp_path, teachers, alone, rendered, together):
    manifests = run_jobs(jobs_of(tmp_path, teachers, views_per_load=together), quiet=True)
    assert [manifest.committed_views() for manifest in manifests] == [(0, 1)] * 3
    assert len(rendered) == len(set(rendered)) == 2 * 1442
    assert_same(tmp_path, alone)


def test_a_store_that_is_further_than_the_others_is_completed_only(tmp_path, teachers, alone):
    first, second, third = jobs_of(tmp_path, teachers)
    run_job(replace(first, views=1), quiet=True)
    run_job(replace(second, part=Part(1, 2)), quiet=True)
    before = (tmp_path / "0.zarr/logits/values/c.0.1.0").stat().st_mtime_ns
    calls = []
    run = first.runner.run
    first.runner.run = lambda pixels: (calls.append(len(pixels)), run(pixels))[1]
    run_jobs([first, second, third], quiet=True)
    assert sum(calls) == 1442, "one view of the first was there"
    assert (tmp_path / "0.zarr/logits/values/c.0.1.0").stat().st_mtime_ns == before
    assert_same(tmp_path, alone)


def test_teachers_with_other_blocks_run_in_a_pass_of_their_own(tmp_path, teachers, alone, capsys):
    jobs = jobs_of(tmp_path, teachers)
    other = replace(jobs[0], store=tmp_path / "other.zarr", block_rows=700)
    run_jobs([*jobs, other])
    assert "views are rendered 2 times" in capsys.readouterr().err
    assert_same(tmp_path, alone)
    run_job(replace(other, store=tmp_path / "once.zarr"), quiet=True)
    assert store_files(tmp_path / "other.zarr") == store_files(tmp_path / "once.zarr")


def test_teachers_that_do_not_belong_together_are_refused(tmp_path, teachers):
    first, second, _ = jobs_of(tmp_path, teachers)
    with pytest.raises(RecipeError, match=r"0.zarr' is named by two teachers: give each its own"):
        run_jobs([first, replace(second, store=first.store)])
    with pytest.raises(
        RecipeError, match="have different sources or view recipes: run them one after the other"
    ):
        run_jobs([first, replace(second, recipe=view_recipe("digits", 5))])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def file(tmp_path, teachers):
    """A file of three teachers that says what `jobs_of` does."""
    own = [{}, {"taps": ["conv2"]}, {"encoding": "int8"}]
    values = {
        "source": "digits", "view": "digits", **FIELDS,
        "teachers": [
            {"teacher": f"run:{teacher}", "store": str(tmp_path / f"{index}.zarr"), **more}
            for index, (teacher, more) in enumerate(zip(teachers, own, strict=True))
        ],
    }  # fmt: skip
    (tmp_path / "teachers.yaml").write_text(write_yaml(values))
    return tmp_path / "teachers.yaml"


def precompute(*words):
    return CliRunner().invoke(main, ["run", *map(str, words)])


def test_the_command_writes_all_stores_of_a_file(tmp_path, file, alone):
    result = precompute(file, "--device=cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("views committed") == 3
    assert_same(tmp_path, alone)
    assert precompute(file, "--device=cpu").exit_code == 0


def test_a_file_that_is_wrong_is_refused_with_all_its_errors(tmp_path, file):
    text = file.read_text()
    file.write_text(text.replace("views: 2", "views: none").replace("taps:", "tap:"))
    result = precompute(file)
    assert result.exit_code == 1
    for line in ("teachers.1.tap: unknown key, did you mean 'taps'?", "views: expected"):
        assert line in result.stderr
    assert not list(tmp_path.glob("*.zarr"))
    assert "cannot read" in precompute(tmp_path / "none.yaml").stderr


def test_options_that_belong_into_the_file_are_refused_beside_it(file):
    result = precompute(file, "--views=3")
    assert result.exit_code == 2
    assert f"--views belongs in {str(file)!r}: leave it out here." in result.stderr
    missing = precompute("--source=digits")
    assert missing.exit_code == 2
    assert "Missing option '--teacher'" in missing.stderr


# Through torchrun.


@pytest.mark.integration
def test_a_killed_rank_costs_its_block_and_no_byte(tmp_path, file, alone):
    """All ranks start again; the store is the one that a single process writes."""
    dying = Path(__file__).with_name("dying_writer.py")
    result = run("torchrun", *TWO, "--max-restarts", 1, dying, "run", file, "--device=cpu")
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path, alone)
    # What torchrun logs of the killed process has a time in front.
    assert "\nTraceback" not in result.stderr
    assert result.stdout.count("views committed") == 3


@pytest.mark.parametrize("given", ["options", pytest.param("file", marks=pytest.mark.integration)])
def test_the_first_rank_shows_the_progress_of_all(tmp_path, file, teachers, given):
    """The other rank is slower: the first waits for it, and prints what both have written, once."""
    slow = Path(__file__).with_name("slow_writer.py")
    options = [f"--teacher=run:{teachers[0]}", "--source=digits", "--view=digits", "--views=2"]
    options += ["--block-rows=500", "--batch-size=100", f"--store={tmp_path / '0.zarr'}"]
    words, stores = ([file], 3) if given == "file" else (options, 1)
    result = run("torchrun", *TWO, slow, "run", *words, "--device=cpu")
    assert result.returncode == 0, result.stderr
    *_, last = (line for line in result.stderr.splitlines() if line.startswith("precompute 0.zarr"))
    rows = f"{stores * 2 * 1442:,}"
    assert f": {rows} of {rows} images, " in last
    assert result.stdout.count("views committed") == stores
    assert all(
        load_manifest(tmp_path / f"{index}.zarr").committed_views() == (0, 1) for index in range(stores)
    )


def test_ranks_have_parts_and_devices_of_their_own(tmp_path, teachers, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    words = [f"--teacher=run:{teachers[0]}", "--source=digits", "--view=digits", "--views=2", "--device=cpu"]
    words += [f"--store={tmp_path / 's.zarr'}", "--block-rows=500"]
    result = precompute(*words)
    assert result.exit_code == 0, result.output
    assert result.stdout == "", "the other rank has not finished"
    assert [path.name for path in sorted((tmp_path / "s.zarr/blocks").iterdir())] == [
        "0.1.json", "1.0.json", "1.2.json"
    ]  # fmt: skip
    refused = precompute(*words, "--part=0/2")
    assert refused.exit_code == 1
    assert "--part 0/2 is given, but torchrun started 2 ranks" in refused.stderr
    monkeypatch.setenv("RANK", "0")
    assert "2 of 2" in precompute(*words).stdout
    assert load_manifest(tmp_path / "s.zarr").committed_views() == (0, 1)


def test_a_rank_has_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert rank_device("cuda") == rank_device("auto") == torch.device("cuda:1")
    assert rank_device("cpu") == torch.device("cpu")
    with pytest.raises(RecipeError, match="device is 'cuda:0', but 4 ranks run on it"):
        rank_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match="this machine has 2 GPUs, but 4 ranks run on it"):
        rank_device("cuda")
