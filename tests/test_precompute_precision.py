"""Precisions of teachers: what a store records of them, what is refused, and what an error says to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import write_teacher
from click.testing import CliRunner
from helpers import make_job, rewrite_manifest, store_files
from safetensors.torch import load_file, save_file

from coursepack.data import open_source
from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.errors import NonFiniteOutput, OutOfMemory, RecipeError, StoreDamaged, UnknownName
from coursepack.models import TeacherRunner, load_teacher
from coursepack.models.build import WEIGHTS_FILE
from coursepack.models.precision import check_precision, has_precision
from coursepack.models.taps import Tap
from coursepack.precompute import run_job
from coursepack.precompute.cli import main
from coursepack.precompute.verify import job_of_store, repair, verify_deep

CPU = torch.device("cpu")
REDUCED = ("float16", "bfloat16")
EVERYTHING = np.arange(1442)


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers[1]


def job_in(path, teacher, *, taps=(), **settings):
    """A job of one view whose runner has the given settings."""
    job = make_job(path, teacher, views=1, block_rows=500)
    network = load_teacher(f"run:{teacher}", open_source("digits").class_names)
    return replace(job, runner=TeacherRunner(network, taps, **settings))


@pytest.fixture
def command(teacher):
    def run(path, **changes):
        options = {"teacher": f"run:{teacher}", "source": "digits", "view": "digits", "views": 1} | changes
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not True]
        flags += [f"--{key.replace('_', '-')}" for key, value in options.items() if value is True]
        return CliRunner().invoke(main, ["run", "--device=cpu", f"--store={path}", *flags])

    return run


@pytest.mark.parametrize("precision", REDUCED)
def test_a_reduced_precision_is_close_and_its_error_is_kept(tmp_path, teacher, precision):
    taps = (Tap(("conv2",)),)
    run_job(job_in(tmp_path / "s.zarr", teacher, taps=taps, precision=precision), quiet=True)
    run_job(job_in(tmp_path / "exact.zarr", teacher, taps=taps), quiet=True)
    manifest, exact = load_manifest(tmp_path / "s.zarr"), load_manifest(tmp_path / "exact.zarr")
    assert manifest.identity["precision"] == precision
    assert exact.identity["precision"] == "float32"
    assert "precision" not in exact.view_records["0"]
    record = manifest.view_records["0"]["precision"]
    logits = [
        StoreReader(tmp_path / name).rows("logits", 0, EVERYTHING[:256]).decode().double()
        for name in ("s.zarr", "exact.zarr")
    ]
    expected = torch.nn.functional.kl_div(
        logits[0].log_softmax(1), logits[1].log_softmax(1), reduction="batchmean", log_target=True
    )
    assert record["rows"] == 256
    assert 0 < record["kl"] < 1e-2
    assert record["kl"] == pytest.approx(expected.item(), rel=0.3)  # both stores are rounded to float16
    assert verify(tmp_path / "s.zarr").problems == ()


def test_a_large_error_is_warned_of(tmp_path, teacher, capsys, monkeypatch):
    monkeypatch.setattr("coursepack.precompute.precision.LARGE_KL", 1e-12)
    run_job(job_in(tmp_path / "s.zarr", teacher, precision="bfloat16"), quiet=True)
    said = capsys.readouterr().err
    assert said.startswith(
        "warning: in bfloat16, the outputs of teacher 'digits-cnn' differ from those in float32"
    )
    assert said.count("warning") == 1
    run_job(job_in(tmp_path / "exact.zarr", teacher), quiet=True)
    assert capsys.readouterr().err == ""


def test_status_and_inspect_show_precision_and_error(tmp_path, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "s.zarr"
    result = command(path, precision="bfloat16")
    assert result.exit_code == 0, result.output
    kl = load_manifest(path).view_records["0"]["precision"]["kl"]
    line = f"bfloat16, mean KL to float32 {kl:.2g} nats over the first 256 samples"
    assert line in result.stdout
    for words in (["status", "--store", str(path)], ["inspect", str(path)]):
        assert line in CliRunner().invoke(main, words).stdout
        facts = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
        facts = facts["stores"][0] if "stores" in facts else facts
        assert facts["precision"] == {"name": "bfloat16", "rows": 256.0, "kl": kl}


def test_a_store_is_not_continued_in_another_precision(tmp_path, command):
    path = tmp_path / "s.zarr"
    assert command(path).exit_code == 0
    files = store_files(path)
    result = command(path, views=2, precision="bfloat16")
    assert result.exit_code == 1
    assert "precision store: float32 recipe: bfloat16" in [
        " ".join(line.split()) for line in result.stderr.splitlines()
    ]
    assert "Use another --store, or the recipe that wrote this one." in result.stderr
    assert store_files(path) == files


def test_a_precision_that_the_device_does_not_have_is_refused(tmp_path, command, monkeypatch):
    result = command(tmp_path / "s.zarr", precision="tf32")
    assert result.exit_code == 1
    assert result.stderr.strip() == (
        "Error: precision 'tf32' needs a CUDA device of compute capability 8.0 or higher, but the device is "
        "'cpu': use --precision float32 or float16 or bfloat16, or another --device"
    )
    assert not (tmp_path / "s.zarr").exists()
    with pytest.raises(UnknownName, match=r"unknown precision 'float61'\. Did you mean 'float16'\?"):
        check_precision("float61", CPU)
    cuda = torch.device("cuda:1")
    for capability, found in {
        (7, 5): ["float32", "float16"],
        (8, 0): ["float32", "tf32", "float16", "bfloat16"],
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert [
            name for name in ("float32", "tf32", "float16", "bfloat16") if has_precision(name, cuda)
        ] == found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(RecipeError, match="'cuda:1': use --precision float32 or float16, or another"):
        check_precision("bfloat16", cuda)


def test_overflow_in_half_precision_names_the_first_sample_and_another_precision(tmp_path, teacher, command):
    """Logits near 1e5 are fine in float32 and in bfloat16, but not in float16."""
    large = tmp_path / "large"
    shutil.copytree(teacher, large)
    state = load_file(large / WEIGHTS_FILE)
    save_file({**state, "head.bias": state["head.bias"] + 1e5}, large / WEIGHTS_FILE)
    fields = {"teacher": f"run:{large}", "encoding": "float32"}
    result = command(tmp_path / "s.zarr", precision="float16", **fields)
    assert result.exit_code == 1
    assert "gives logits that are not finite for 256 samples of a batch (0, 1, 2, 3" in result.stderr
    assert "values may exceed the range of float16; use --precision float32 or bfloat16" in result.stderr
    assert "Traceback" not in result.output
    for precision in ("float32", "bfloat16"):
        assert command(tmp_path / f"{precision}.zarr", precision=precision, **fields).exit_code == 0


@pytest.mark.parametrize(
    "text", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", None]
)
def test_a_batch_without_memory_names_a_smaller_one(tmp_path, teacher, text):
    job = job_in(tmp_path / "s.zarr", teacher)

    def fail(_, inputs):
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.") if text is None else RuntimeError(text)

    job.runner.network.module.register_forward_pre_hook(fail)
    expected = (
        r"^teacher 'digits-cnn' needs more memory than device 'cpu' has free for a batch of 256 images: "
        r"give a smaller --batch-size, such as 128$"
    )
    with pytest.raises(OutOfMemory, match=expected):
        run_job(job, quiet=True)


def test_other_errors_of_a_teacher_are_not_about_memory(tmp_path, teacher):
    job = job_in(tmp_path / "s.zarr", teacher)
    job.runner.network.module.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        job.runner.run(torch.zeros(2, 8, 8, 1, dtype=torch.uint8))


def test_channels_last_and_compile_are_numerics(tmp_path, teacher):
    def environment(**settings):
        return job_in(tmp_path / "s.zarr", teacher, **settings).environment()

    plain, last = environment(), environment(channels_last=True)
    assert (plain["memory_layout"], last["memory_layout"]) == ("contiguous", "channels_last")
    assert (plain["compile"], environment(compiled=True)["compile"]) == (False, True)
    numerics = {entry["numerics"] for entry in (plain, last, environment(compiled=True))}
    assert len(numerics) == 3
    assert environment(precision="bfloat16")["numerics"] == plain["numerics"], "precision is identity"


@pytest.mark.parametrize(
    "settings", [{"channels_last": True}, pytest.param({"compiled": True}, marks=pytest.mark.integration)]
)
def test_layout_and_compiling_change_no_more_than_the_last_bits(tmp_path, teacher, settings):
    """Also with taps, whose layers are watched while the network runs compiled."""
    taps = (Tap(("conv2",)), Tap(("hidden",)))
    plain, other = (job_in(tmp_path / "s.zarr", teacher, taps=taps, **each).runner for each in ({}, settings))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        pixels = torch.randint(0, 17, (40, 8, 8, 1), dtype=torch.uint8, generator=generator)
        expected = plain.run(pixels).arrays()
        for name, value in other.run(pixels).arrays().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-4)


def test_a_compiled_teacher_sees_one_shape_and_is_verified_and_repaired(tmp_path, teacher):
    path = tmp_path / "s.zarr"
    job = job_in(path, teacher, compiled=True, channels_last=True)
    shapes = set()
    run = job.runner.run
    job.runner.run = lambda pixels: (shapes.add(len(pixels)), run(pixels))[1]
    run_job(job, quiet=True)
    assert shapes == {256}
    manifest = load_manifest(path)
    again = job_of_store(path, manifest, weights=None, root=None, device=CPU)
    assert (again.runner.compiled, again.runner.memory_layout) == (True, "channels_last")
    files = store_files(path)
    (path / "logits/values/c.0.1.0").unlink()
    assert repair(again, verify(path).problems) == ()
    assert store_files(path) == files
    assert verify_deep(again, 100).wrong == ()


def test_verify_runs_float32_where_a_precision_is_missing(tmp_path, teacher):
    """A store that says tf32, checked on a CPU, which has none."""
    path = tmp_path / "s.zarr"
    run_job(job_in(path, teacher), quiet=True)
    manifest = load_manifest(path)
    tf32 = replace(manifest, identity={**manifest.identity, "precision": "tf32"})
    arguments = {"weights": None, "root": None, "device": CPU}
    assert job_of_store(path, tf32, **arguments, float32_instead=True).runner.precision == "float32"
    with pytest.raises(RecipeError, match="precision 'tf32' needs a CUDA device"):
        job_of_store(path, tf32, **arguments)


def test_verify_deep_runs_the_precision_of_the_store(tmp_path, teacher):
    path = tmp_path / "s.zarr"
    run_job(job_in(path, teacher, precision="bfloat16"), quiet=True)
    job = job_of_store(path, load_manifest(path), weights=None, root=None, device=CPU)
    assert job.runner.precision == "bfloat16"
    assert verify_deep(job, 100).wrong == ()
    wrong = replace(job, runner=job_in(path, write_teacher(tmp_path / "other", "digits-cnn", seed=9)).runner)
    assert len(verify_deep(wrong, 100).wrong) > 50


@pytest.mark.parametrize("value", [7, {"rows": 256}, {"rows": 256, "kl": "small"}, {"rows": 0, "kl": 0.0}])
def test_a_record_of_precision_that_is_none_is_damage(tmp_path, teacher, value):
    path = tmp_path / "s.zarr"
    run_job(job_in(path, teacher, precision="bfloat16"), quiet=True)

    def change(values):
        values["view_records"]["0"]["precision"] = value

    rewrite_manifest(path, change)
    with pytest.raises(StoreDamaged):
        dict(load_manifest(path).view_records)["0"]
    assert CliRunner().invoke(main, ["status", "--store", str(path)]).exit_code == 1


def test_an_error_in_the_first_rows_is_the_usual_one(tmp_path, teacher):
    job = job_in(tmp_path / "s.zarr", teacher, precision="bfloat16")
    with torch.no_grad():
        job.runner.network.module.head.bias[3] = float("nan")
    with pytest.raises(
        NonFiniteOutput, match="range of bfloat16; use --precision float32 or float16, and if"
    ):
        run_job(job, quiet=True)
