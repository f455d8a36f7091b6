"""Teachers compute in IEEE float32, and a store says on what kind of machine its rows were computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers import make_job, rewrite_manifest, store_files
from spawned import run

from coursepack.data.store import load_manifest, verify
from coursepack.data.store.owners import Part
from coursepack.errors import StoreMismatch
from coursepack.precompute import run_job
from coursepack.precompute.cli import main
from coursepack.precompute.verify import job_of_store, repair

SETTINGS = """
import json, torch
from coursepack.models import TeacherRunner, build_network

backends = torch.backends
NODES = {"general": backends, "cudnn": backends.cudnn, "matmul": backends.cuda.matmul,
         "conv": backends.cudnn.conv, "rnn": backends.cudnn.rnn, "cpu matmul": backends.mkldnn.matmul,
         "cpu conv": backends.mkldnn.conv, "cpu rnn": backends.mkldnn.rnn}

def settings():
    return {name: node.fp32_precision for name, node in NODES.items()}

network = build_network("digits-cnn", 10, seed=0)
within = []
network.module.register_forward_hook(lambda *_: within.append(settings()))
runner = TeacherRunner(network)
pixels = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
found = {}

def look(case):
    before = settings()
    runner.run(pixels)
    found[case] = [before, within.pop(), settings()]

look("default")
backends.cudnn.fp32_precision = "ieee"
found["set afterwards"] = settings()
backends.cudnn.fp32_precision = "none"
backends.fp32_precision = "tf32"
look("general")
backends.fp32_precision = "none"
torch.set_float32_matmul_precision("medium")
look("older")
backends.cudnn.conv.fp32_precision = "tf32"
network.module.register_forward_hook(lambda *_: 1 / 0)
before = settings()
try:
    runner.run(pixels)
except ZeroDivisionError:
    found["error"] = [before, within.pop(), settings()]
print(json.dumps(found))
"""


TWICE = """
import json, sys
from click.testing import CliRunner
from coursepack.data.store import load_manifest
from coursepack.precompute.cli import main
store, *words = sys.argv[1:]
found = []
for more in (["--same-numerics"], []):
    result = CliRunner().invoke(main, words + more)
    found.append({name: getattr(result, name) for name in ("exit_code", "stdout", "stderr")})
    found[-1]["views"] = load_manifest(store).views
print(json.dumps(found))
"""


@pytest.fixture
def store(tmp_path, teacher):
    """One view, in batches of 256."""
    run_job(make_job(tmp_path / "s.zarr", teacher, views=1, block_rows=500), quiet=True)
    return tmp_path / "s.zarr"


def environments(store, view=0):
    return load_manifest(store).view_records[str(view)]["environments"]


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_teachers_compute_in_ieee_float32_and_leave_the_settings_alone():
    result = run("code", SETTINGS)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["default"][0]["conv"] == "tf32", "torch's own default is what this is about"
    assert found["older"][0]["cpu matmul"] == "bf16"
    for before, within, after in (found[case] for case in ("default", "general", "older", "error")):
        used = {name: value for name, value in within.items() if name != "general"}
        assert set(used.values()) <= {"ieee", "none"}
        assert used["conv"] == used["rnn"] == used["matmul"] == "ieee"
        assert after == before
    # What follows a general setting still does.
    assert found["set afterwards"]["conv"] == "ieee"


def test_every_block_records_what_decides_the_last_bits(store, teacher):
    [found] = environments(store)
    assert found["device"] == "cpu"
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["batch_size"] == 256
    assert found["memory_layout"] == "contiguous"
    assert found["compile"] is False
    assert found["device_name"]
    assert len(found["numerics"]) == 64


def test_numerics_follow_the_numeric_facts_alone(tmp_path, teacher, monkeypatch):
    def numerics(**fields):
        return make_job(tmp_path / "s.zarr", teacher, **fields).environment()["numerics"]

    own = numerics()
    assert numerics(views=7, views_per_load=2, workers=3, encoding="int8", part=Part(1, 2)) == own
    assert numerics(batch_size=64) != own
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")
        assert numerics() != own
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
        assert numerics() != own
    with monkeypatch.context() as patch:
        patch.setattr("coursepack.precompute.numerics.version", lambda name: f"{name} 99")
        other = make_job(tmp_path / "s.zarr", teacher).environment()
    assert other["numerics"] != own, "of torch"
    assert numerics() == own


def test_more_views_of_other_numerics_warn_with_the_difference(store, teacher, capsys):
    run_job(make_job(store, teacher, views=2, block_rows=500), quiet=True)
    assert capsys.readouterr().err == ""
    run_job(make_job(store, teacher, views=3, block_rows=500, batch_size=64), quiet=True)
    said = capsys.readouterr().err
    assert f"warning: store {str(store)!r} has rows of other numerics than this run's" in said
    assert [line for line in lines(said) if " store: " in line and " here: " in line] == [
        "batch_size store: 256 here: 64"
    ]
    assert said.count("warning") == 1
    assert load_manifest(store).committed_views() == (0, 1, 2)
    assert verify(store).problems == ()


def test_same_numerics_refuses_others_and_changes_nothing(store, teacher):
    files = store_files(store)
    with pytest.raises(
        StoreMismatch, match=r"other numerics than this run's\.\n +batch_size +store: 256 +here"
    ):
        run_job(make_job(store, teacher, views=3, batch_size=64), quiet=True, same_numerics=True)
    assert store_files(store) == files
    run_job(make_job(store, teacher, views=2), quiet=True, same_numerics=True)
    assert load_manifest(store).committed_views() == (0, 1)


def test_blocks_of_views_that_are_not_committed_count_too(tmp_path, teacher, capsys):
    path, fields = tmp_path / "s.zarr", {"views": 1, "block_rows": 500}
    run_job(make_job(path, teacher, **fields, part=Part(0, 2)), quiet=True)
    second = make_job(path, teacher, **fields, part=Part(1, 2), batch_size=64)
    with pytest.raises(StoreMismatch, match="batch_size"):
        run_job(second, quiet=True, same_numerics=True)
    run_job(second, quiet=True)
    assert "batch_size store: 256 here: 64" in lines(capsys.readouterr().err)
    assert [entry["batch_size"] for entry in environments(path)] == [256, 64]


def test_rows_that_others_write_meanwhile_are_noticed_at_the_end(tmp_path, teacher, capsys):
    path, fields = tmp_path / "s.zarr", {"views": 1, "block_rows": 500}

    def order():
        run_job(make_job(path, teacher, **fields, batch_size=64, part=Part(1, 2)), quiet=True)
        assert capsys.readouterr().err.count("warning") == 1
        yield 2

    run_job(make_job(path, teacher, **fields, part=Part(0, 2)), quiet=True, block_order=iter([0]))
    run_job(make_job(path, teacher, **fields, part=Part(0, 2)), quiet=True, block_order=order())
    assert "batch_size store: 64 here: 256" in lines(capsys.readouterr().err)


def test_stores_without_numerics_are_read_and_extended(store, teacher, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def forget(values):
        for record in values["view_records"].values():
            record["environments"] = [{"torch": "2.11.0", "device": "cpu", "batch_size": 7}]

    rewrite_manifest(store, forget)
    with pytest.raises(StoreMismatch, match="has rows without recorded numerics"):
        run_job(make_job(store, teacher), quiet=True, same_numerics=True)
    run_job(make_job(store, teacher), quiet=True)
    assert capsys.readouterr().err == ""
    result = CliRunner().invoke(main, ["status", "--store", str(store)])
    assert "numerics │ not recorded, views: 1" in " ".join(result.stdout.split())


def test_repair_on_another_kind_of_machine_warns(store, monkeypatch, capsys):
    job = job_of_store(store, load_manifest(store), weights=None, root=None, device=torch.device("cpu"))
    (store / "logits/values/c.0.0.0").unlink()
    capability = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")
    repair(job, verify(store).problems)
    assert f"cpu_capability store: {capability} here: VSX" in lines(capsys.readouterr().err)
    assert verify(store).problems == ()


def test_status_and_inspect_show_the_numerics(store, teacher, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run_job(make_job(store, teacher, views=3, batch_size=64), quiet=True)
    names = [environments(store, view)[0]["numerics"] for view in (0, 1)]
    for command in (["status", "--store"], ["inspect"]):
        shown = CliRunner().invoke(main, [*command, str(store)]).stdout
        assert f"{names[0][:12]}: cpu " in shown
        assert "batches of 256, views: 1" in shown
        assert "batches of 64, views: 2" in shown
        facts = json.loads(CliRunner().invoke(main, [*command, str(store), "--json"]).stdout)
        groups = facts["stores"][0]["numerics"] if command == ["inspect"] else facts["numerics"]
        assert [(group["numerics"], group["views"]) for group in groups] == [
            (names[0], [0]),
            (names[1], [1, 2]),
        ]


@pytest.mark.integration
def test_another_kind_of_cpu_is_told_by_the_command(store, teacher):
    """ATen's plainest instructions stand in for an older CPU."""
    words = ["run", "--teacher", f"run:{teacher}", "--source", "digits"]
    words += ["--view", "digits", "--views", "2", "--store", str(store)]
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(store), *words],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    refused, warned = json.loads(done.stdout)
    capability = torch.backends.cpu.get_cpu_capability()
    line = f"cpu_capability store: {capability} here: DEFAULT"
    assert (refused["exit_code"], refused["views"]) == (1, 1)
    assert refused["stderr"].startswith(
        f"Error: store {str(store)!r} has rows of other numerics than this run's."
    )
    assert line in lines(refused["stderr"])
    assert (warned["exit_code"], warned["views"]) == (0, 2)
    assert line in lines(warned["stderr"])
    assert f"{environments(store, 1)[0]['numerics'][:12]}: cpu " in warned["stdout"]
