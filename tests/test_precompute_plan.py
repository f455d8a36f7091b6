"""`plan` and `inspect`: what a store will cost, and what it holds, against plain counting and NumPy."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from builders import write_teacher
from click.testing import CliRunner
from helpers import make_job, store_files

from coursepack.console import byte_size
from coursepack.data import open_source, view_recipe
from coursepack.data.store import StoreReader, load_manifest
from coursepack.data.store.locations import open_location
from coursepack.data.store.owners import Part
from coursepack.errors import StoreFull, StoreMismatch
from coursepack.models import parse_tap
from coursepack.precompute import plan as plan_module
from coursepack.precompute import run_job
from coursepack.precompute.cli import main
from coursepack.precompute.inspect import agreement, common_view, describe_store
from coursepack.precompute.plan import LEVEL_VIEWS, POINTS_BELOW, Probe, check_space, costs

SAMPLES = 1442
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def command(teacher):
    """Run `precompute` in this process."""
    job = [f"--teacher=run:{teacher}", "--source=digits", "--view=digits", "--device=cpu"]

    def run(name, *words):
        options = job if name in ("run", "plan") else []
        return CliRunner().invoke(main, [name, *options, *map(str, words)])

    return run


@pytest.fixture
def free(monkeypatch):
    """Set the bytes that are free on the disk."""
    return lambda count: monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, count))


ENCODINGS = [("float32", "bfloat16"), ("float16", "float32"), ("int8", "int8"), ("topk:2", "bits")]


@pytest.mark.parametrize(("encoding", "feature_encoding"), ENCODINGS)
def test_the_plan_is_what_the_run_writes(tmp_path, teacher, encoding, feature_encoding):
    path = tmp_path / "s.zarr"
    taps = [parse_tap("hidden1"), parse_tap("hidden2:sign")]
    job = make_job(
        path, teacher, taps=taps, encoding=encoding, feature_encoding=feature_encoding, block_rows=500
    )
    cost = costs(job)
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []
    assert (cost.rows, cost.rows_left) == (2 * SAMPLES, 2 * SAMPLES)
    assert (cost.blocks, cost.block_rows) == (6, 500)
    manifest = run_job(job)
    group = {array.name: array for array in cost.arrays}
    assert group.keys() == manifest.arrays.keys()
    written = 0
    for name, stored in manifest.arrays.items():
        files = [(key, size) for key, (size, _) in manifest.files.items() if key.startswith(f"{name}/")]
        assert group[name].shards == len(files) == 6 * len(stored.components)
        parts = StoreReader(path).components(name, 0, np.arange(SAMPLES))
        assert group[name].row_bytes == sum(part[0].nbytes for part in parts.values())
        assert group[name].encoding == stored.encoding.name
        assert group[name].total_bytes == sum(size for _, size in files)
        written += group[name].total_bytes
    # To the byte, though the last chunk of each view is padded and every chunk has its checksum.
    on_disk = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("c.*")}
    assert cost.total_bytes == cost.bytes_left == sum(on_disk.values())
    assert cost.table_bytes == cost.total_bytes - written
    assert cost.files == len(on_disk)
    assert on_disk == {key: size for key, (size, _) in manifest.files.items()}
    after = costs(job)
    assert (after.rows, after.rows_left, after.bytes_left) == (2 * SAMPLES, 0, 0)


def test_rows_left_after_part_of_a_run(tmp_path, teacher):
    options = {"block_rows": 500, "encoding": "int8"}
    path = tmp_path / "s.zarr"
    # Blocks of 500, 500 and 442 rows: the first view but its last block, and the last block of the second.
    run_job(make_job(path, teacher, **options), block_order=iter([0, 1, 5]))
    before = store_files(path)
    cost = costs(make_job(path, teacher, **options))
    assert cost.rows_left == 2 * SAMPLES - 500 - 500 - 442
    assert cost.rows == 2 * SAMPLES
    missing = {"c.0.2.0", "c.1.0.0", "c.1.1.0"}
    before_sizes = {file.relative_to(path).as_posix() for file in path.rglob("c.*")}
    parts = [costs(make_job(path, teacher, part=Part(index, 2), **options)).rows_left for index in (0, 1)]
    assert parts == [442 + 500, 500]
    wider = costs(make_job(path, teacher, **(options | {"views": 3})))
    assert (wider.rows, wider.rows_left) == (3 * SAMPLES, cost.rows_left + SAMPLES)
    tap = costs(make_job(path, teacher, taps=[parse_tap("hidden1")], **options))
    assert {array.name for array in tap.arrays} == {"features/hidden1", "logits"}
    assert store_files(path) == before
    manifest = run_job(make_job(path, teacher, **options))
    written = {key: size for key, (size, _) in manifest.files.items() if key not in before_sizes}
    assert {key.rpartition("/")[2] for key in written} == missing
    assert cost.bytes_left == sum(written.values())


def test_a_tap_that_is_added_needs_space_for_the_tap_alone(tmp_path, teacher):
    path = tmp_path / "s.zarr"
    run_job(make_job(path, teacher, encoding="float32"))
    cost = costs(make_job(path, teacher, encoding="float32", taps=[parse_tap("hidden2:sign")]))
    sizes = {array.name: array.total_bytes for array in cost.arrays}
    assert cost.rows_left == 2 * SAMPLES
    assert cost.bytes_left == sizes["features/hidden2@sign"] < sizes["logits"]


def test_a_plan_for_a_store_of_another_recipe_is_refused(tmp_path, teacher):
    run_job(make_job(tmp_path / "s.zarr", teacher, views=1))
    with pytest.raises(StoreMismatch, match="another form"):
        costs(make_job(tmp_path / "s.zarr", teacher, views=1, encoding="float32"))


def test_the_command_plans_and_writes_nothing(tmp_path, command, monkeypatch):
    monkeypatch.setattr(plan_module, "probe", lambda _: Probe(50e-6, 10e-6))
    monkeypatch.setattr("coursepack.precompute.plan.probe", lambda _: Probe(50e-6, 10e-6))
    result = command("plan", "--views=8", "--store", tmp_path / "a/b/s.zarr", "--tap=hidden1")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    rows = f"{8 * SAMPLES:,} rows in", f"{8 * SAMPLES:,} to do"
    for text in (
        "logits",
        "features/hidden1",
        *rows,
        "free disk",
        "20,000 images/s",
        "after 10.0 student epochs",
    ):
        assert text in result.stdout, text


def test_the_command_times_the_teacher_itself(tmp_path, command):
    result = command("plan", "--views=2", "--store", tmp_path / "s.zarr", "--encoding=int8", "--tap=hidden1")
    assert result.exit_code == 0, result.output
    assert "images/s on cpu" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_break_even_by_hand():
    # V views cost V * teacher once; every epoch then saves teacher - read.
    assert Probe(10.0, 2.0).break_even(8) == 10.0
    assert Probe(1.0, 0.0).break_even(8) == 8.0
    assert Probe(2.0, 1.0).break_even(3) == 6.0
    assert math.isinf(Probe(1.0, 1.0).break_even(3))
    assert math.isinf(Probe(1.0, 2.0).break_even(3))


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, teacher, command, free):
    path = tmp_path / "s.zarr"
    job = make_job(path, teacher, encoding="float32")
    need = costs(job).bytes_left
    assert need >= 2 * SAMPLES * 40
    free(need)
    check_space(job)
    free(need - 1)
    with pytest.raises(
        StoreFull, match=r"needs .* more, but .* are free there\. Choose a smaller --encoding"
    ):
        check_space(job)
    for name in ("plan", "run"):
        result = command(name, "--views=2", "--encoding=float32", "--store", path)
        assert (result.exit_code, "Traceback" in result.stderr) == (1, False)
        assert "or --ignore-space" in result.stderr
        assert list(tmp_path.iterdir()) == []
    assert "free disk" in command("plan", "--views=2", "--encoding=float32", "--store", path).stdout
    assert command("run", "--views=2", "--encoding=int8", "--store", tmp_path / "small.zarr").exit_code == 0
    result = command("run", "--views=2", "--encoding=float32", "--store", path, "--ignore-space")
    assert result.exit_code == 0
    assert load_manifest(path).committed_views() == (0, 1)
    free(0)
    assert command("run", "--views=2", "--encoding=float32", "--store", path).exit_code == 0, (
        "nothing is left"
    )


def test_the_plan_prints_the_size_that_status_does_of_a_store_of_kilobytes(tmp_path, command):
    options = ["--views=3", "--encoding=int8", "--store", tmp_path / "s.zarr"]
    planned = command("plan", *options).stdout
    assert command("run", *options).exit_code == 0
    size = json.loads(command("status", "--store", tmp_path / "s.zarr", "--json").stdout)["bytes"]
    lines = [line for line in planned.splitlines() if "in all" in line and "array" not in line]
    assert len(lines) == 1
    assert byte_size(size) in lines[0]
    assert f"needed {byte_size(size)}" in planned


def test_the_plan_has_what_views_bought_on_the_digits_as_measured(tmp_path, command):
    root = Path(__file__).parents[1]
    measured = json.loads((root / "benchmarks/results/views-students.json").read_text())["rows"]
    rows = {row["config"]["views"]: row for row in measured if row["id"].endswith(": kd - new views")}
    assert {row["n"] for row in rows.values()} == {10}
    below = {views: round(-row["value"], 1) for views, row in rows.items() if row["high"] < 0}
    assert below == POINTS_BELOW
    assert all(row["low"] <= 0 <= row["high"] for views, row in rows.items() if views >= LEVEL_VIEWS)
    shown = command("plan", "--views=1", "--store", tmp_path / "s.zarr").stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("views: on the digits ")]
    assert " and ".join(map(str, POINTS_BELOW.values())) in line
    assert line.endswith("other data were not measured (docs/benchmarks.md#how-many-views)")
    assert "### How many views" in (root / "docs/benchmarks.md").read_text()


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(9, 2, 7))
    assert open_location(tmp_path / "a/b/s.zarr").free_bytes() == 7
    assert asked == [tmp_path]


@pytest.mark.parametrize("name", ["plan", "run"])
def test_topk_that_would_not_be_smaller_falls_back_and_says_so(tmp_path, command, name):
    path = tmp_path / "s.zarr"
    result = command(name, "--views=1", "--encoding=topk:5", "--store", path)
    assert result.exit_code == 0, result.output
    warning = "encoding topk:5 would not be smaller than int8 for 10 classes: logits are stored as int8"
    assert warning in result.stderr
    if name == "run":
        assert load_manifest(path).arrays["logits"].encoding.name == "int8"
    small = command(name, "--views=1", "--encoding=topk:2", "--store", tmp_path / "k.zarr")
    assert small.exit_code == 0
    assert "would not be smaller" not in small.stderr


# inspect


def softmax(logits, temperature=1.0):
    scaled = logits.astype(np.float64) / temperature
    raised = np.exp(scaled - scaled.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory, teacher):
    """A store per encoding, and the teacher's own float32 logits per view."""
    folder = tmp_path_factory.mktemp("inspected")
    for encoding in ("float32", "float16", "bfloat16", "int8", "topk:2"):
        run_job(
            make_job(
                folder / f"{encoding}.zarr".replace(":", ""),
                teacher,
                encoding=encoding,
                views=2,
                block_rows=700,
            )
        )
    reader = StoreReader(folder / "float32.zarr")
    return folder, [reader.components("logits", view, np.arange(SAMPLES))["values"] for view in (0, 1)]


def expected_calibration(probabilities, labels):
    confidence, top = probabilities.max(1), probabilities.argmax(1)
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = abs((top[inside] == labels[inside]).mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


def test_facts_about_the_teacher_against_numpy(inspected):
    folder, logits = inspected
    labels = open_source("digits").labels
    facts = describe_store(StoreReader(folder / "float32.zarr"))
    assert facts["views"].keys() == {"0", "1"}
    for view, values in enumerate(logits):
        told, p = facts["views"][str(view)], softmax(values)
        assert told["accuracy"] == pytest.approx((values.argmax(1) == labels).mean(), abs=1e-12)
        assert told["cross_entropy"] == pytest.approx(-np.log(p[np.arange(SAMPLES), labels]).mean(), rel=1e-5)
        assert told["entropy"] == pytest.approx(-(p * np.log(p.clip(1e-300))).sum(1).mean(), rel=1e-5)
        assert told["calibration_error"] == pytest.approx(expected_calibration(p, labels), abs=1e-5)
        assert told["calibration_error"] > 0.05
        assert told["fidelity"] == {}
    assert facts["views"]["0"] != facts["views"]["1"]


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "int8", "topk2"])
def test_fidelity_against_numpy_over_all_rows(inspected, encoding):
    import torch

    folder, logits = inspected
    reader = StoreReader(folder / f"{encoding}.zarr")
    facts = describe_store(reader)
    for view, values in enumerate(logits):
        rows = reader.rows("logits", view, np.arange(SAMPLES))
        for temperature in (1.0, 4.0):
            decoded = rows.decode(torch.full((SAMPLES,), temperature)).numpy()
            p, q = softmax(values, temperature), softmax(decoded, temperature)
            with np.errstate(divide="ignore", invalid="ignore"):
                kl = np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(1)
            told = facts["views"][str(view)]["fidelity"][f"T={temperature:g}"]
            # Single precision cancels below some 1e-7 nats a row.
            assert told["mean"] == pytest.approx(kl.mean(), rel=2e-2, abs=2e-8)
            assert told["largest"] == pytest.approx(kl.max(), rel=2e-2, abs=2e-7)
            exact = np.sort(kl)[-(math.floor(0.01 * SAMPLES) + 1)]
            assert told["p99"] >= exact * 0.98 - 2e-7
            assert told["p99"] <= exact * 10 ** (1 / 16) * 1.02 + 2e-7
            assert told["mean"] <= told["p99"] <= told["largest"]
    if encoding == "topk2":
        assert facts["views"]["0"]["fidelity"]["T=1"]["mean"] > 1e-5


def test_agreement_against_numpy(inspected, tmp_path, teacher):
    folder, logits = inspected
    other = write_teacher(tmp_path / "cnn", "digits-cnn", seed=3)
    run_job(make_job(tmp_path / "cnn.zarr", other, views=2, encoding="float32"))
    readers = [StoreReader(folder / "float32.zarr"), StoreReader(tmp_path / "cnn.zarr")]
    values = readers[1].components("logits", 0, np.arange(SAMPLES))["values"]
    share = (logits[0].argmax(1) == values.argmax(1)).mean()
    assert 0 < share < 1
    assert agreement(readers, 0) == [[1.0, pytest.approx(share)], [pytest.approx(share), 1.0]]
    # The first view that both have.
    run_job(make_job(tmp_path / "late.zarr", other, encoding="float32", block_rows=SAMPLES),
            block_order=iter([1]))  # fmt: skip
    late = StoreReader(tmp_path / "late.zarr")
    assert late.views == (1,)
    second = readers[1].components("logits", 1, np.arange(SAMPLES))["values"]
    share = (logits[1].argmax(1) == second.argmax(1)).mean()
    view = common_view([readers[0], late])
    assert view == 1
    assert agreement([readers[0], late], view)[0][1] == pytest.approx(share)


def test_stores_without_a_common_view_of_the_same_pixels_have_no_agreement(tmp_path, teacher, command):
    """Stores of other views, and of another view recipe with as many samples, are shown one by one."""
    kept = tmp_path / "kept.zarr"
    run_job(make_job(kept, teacher, views=2))
    early, late, other = tmp_path / "early.zarr", tmp_path / "late.zarr", tmp_path / "other.zarr"
    for store, view in ((early, "0"), (late, "1")):
        assert command("copy", kept, store, "--view-indices", view).exit_code == 0
    run_job(make_job(other, teacher, recipe=view_recipe("none")))
    for several in ((early, late), (kept, other)):
        result = command("inspect", *several, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["agreement"] is None
        assert "agreement of top classes" not in command("inspect", *several).output


def test_inspect_command(inspected, command):
    folder, _ = inspected
    paths = [folder / "float32.zarr", folder / "int8.zarr"]
    result = command("inspect", *paths, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["stores"] == [json.loads(json.dumps(describe_store(StoreReader(path)))) for path in paths]
    assert told["agreement"][0][1] == pytest.approx(1, abs=0.01)
    assert told["stores"][1]["arrays"]["logits"]["row_bytes"] == 14
    assert told["stores"][1]["static"] == ["static/head_bias", "static/head_weight"]
    shown = command("inspect", *paths)
    assert shown.exit_code == 0, shown.output
    for text in ("int8", "float32", "calibration error", "KL T=4: mean, p99", "agreement of top classes"):
        assert text in shown.stdout, text
    alone = command("inspect", paths[0])
    assert alone.exit_code == 0
    assert "agreement" not in alone.stdout
    missing = command("inspect", folder / "none.zarr")
    assert (missing.exit_code, "there is no store at" in missing.stderr) == (1, True)
