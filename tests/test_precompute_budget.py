"""Plans of a store on a cluster, against arithmetic worked by hand, and a bucket's own count of requests."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner
from helpers import make_job

from coursepack.data.store import load_manifest
from coursepack.data.store.locations import open_location
from coursepack.errors import UnknownName
from coursepack.models import parse_tap
from coursepack.precompute import run_job
from coursepack.precompute.budget import Prices, budget, too_warm
from coursepack.precompute.cli import main
from coursepack.precompute.plan import Probe

# 1442 samples in blocks of 500 are 3 blocks. Chunks and shards are blocks, and the last chunk is filled up; a
# chunk has 4 bytes of checksum, and a shard of one chunk an index of 20.
INT8_VIEW = 3 * (500 * 10 + 24) + 3 * (500 * 4 + 24)
TABLES = (1442 * 8 + 24) + (10 * 128 * 4 + 24) + (10 * 4 + 24)
"""Labels, and weight and bias of the head of `digits-mlp`."""


@pytest.fixture
def job(tmp_path, teacher):
    return make_job(tmp_path / "s.zarr", teacher, encoding="int8", block_rows=500)


def test_a_budget_by_hand(job):
    found = budget(job, "int8", Probe(teacher=0.5, read=0.1))
    assert (found.encoding, found.rows, found.views, found.row_bytes) == ("int8", 2884, 2, 14)
    assert found.total_bytes == 2 * INT8_VIEW + TABLES
    # Two components of three files; a zarr.json each for five arrays, two groups and the root.
    assert found.objects == 2 * 6 + 3 + 8 + 2 + 1
    # Done-objects of three blocks a view; the manifest is created, and replaced for every view.
    assert found.puts == 2 * (6 + 3) + 3 + 8 + 2 + (1 + 2)
    assert found.gets == 2 * (6 + 1)
    assert found.hours == pytest.approx(1442 / 3600)
    assert found.break_even == 2 * 0.5 / (0.5 - 0.1) == 2.5


def test_money_by_hand(job):
    found = budget(job, "int8", Probe(teacher=0.5, read=0.1))
    prices = Prices(gpu_hour=3600, gb_month=1e6, puts=1000, gets=2000)
    assert found.writing(prices) == pytest.approx(1442 + 34)
    assert found.month(prices) == pytest.approx((2 * INT8_VIEW + TABLES) / 1000)
    assert found.reading(prices) == 28
    # An epoch saves the device-hours of one view and costs its GETs.
    assert found.break_even_money(prices) == pytest.approx((1476 + found.month(prices)) / (721 - 14))
    assert found.break_even_money(Prices(gpu_hour=7)) == pytest.approx(2)
    assert math.isinf(found.break_even_money(Prices(gpu_hour=3600, gets=103_000)))
    assert math.isinf(found.break_even_money(Prices(puts=1)))


def test_encodings_side_by_side_by_hand(job):
    timing = Probe(0.5, 0.1)
    wide = budget(job, "float32", timing)
    assert (wide.row_bytes, wide.gets) == (40, 2 * (3 + 1))
    assert wide.total_bytes == 2 * 3 * (500 * 40 + 24) + TABLES
    # ids and values of two classes, and the tail: three components.
    sparse = budget(job, "topk16:2", timing)
    assert (sparse.row_bytes, sparse.gets) == (2 * 2 + 2 * 2 + 4 * 2, 2 * (9 + 1))
    assert budget(job, "topk16:9", timing).encoding == "float16"
    with pytest.raises(UnknownName, match="int9"):
        budget(job, "int9", timing)
    assert not open_location(job.store).names("")


@pytest.mark.integration
def test_requests_are_those_that_a_bucket_counts(bucket, s3_server, teacher):
    address = f"s3://{bucket}/s.zarr"
    job = make_job(address, teacher, taps=[parse_tap("hidden1")], encoding="int8", block_rows=500)
    planned = budget(job, "int8", Probe(1, 0))
    s3_server.requests.clear()
    run_job(job, quiet=True)
    puts = sum(
        count
        for (method, name), count in s3_server.requests.items()
        if method == "PUT" and ("." in name and "of1.json" not in name)
    )
    assert puts == planned.puts
    keys = [str(entry["path"]) for entry in open_location(address)._client().list().collect()]
    assert len([key for key in keys if not key.startswith("runs/")]) == planned.objects
    assert planned.total_bytes == load_manifest(address).data_bytes


@pytest.mark.parametrize(
    ("encoding", "temperature", "warned"),
    [("topk16:100", 4, True), ("topk16:100", 2.1, True), ("topk:100", 2, False), ("topk:100", None, False),
     ("int8", 4, False), ("int4", 4, False), ("float16", 20, False)],
)  # fmt: skip
def test_top_k_rows_are_for_low_temperatures(encoding, temperature, warned):
    text = too_warm(encoding, temperature, 21_841)
    assert (text is not None) == warned
    # 21,841 + 4 bytes over 100 (2 + 2) + 8.
    assert text is None or "int4 26.8 times for larger errors" in text
    assert text is None or "--encoding int8 holds at any temperature and takes 53.5 times the bytes" in text


@pytest.fixture
def plan(tmp_path, teacher, monkeypatch):
    """Run `precompute plan` with made-up times."""
    monkeypatch.setattr("coursepack.precompute.plan.probe", lambda _: Probe(0.5, 0.1))
    monkeypatch.setattr("coursepack.precompute.plan.read_seconds", lambda _: 0.25)
    job = [f"--teacher=run:{teacher}", "--source=digits", "--view=digits", "--device=cpu", "--views=2"]
    job += ["--block-rows=500", "--encoding=int8", f"--store={tmp_path / 's.zarr'}"]
    return lambda *words: CliRunner().invoke(main, ["plan", *job, *words])


def test_without_prices_there_is_no_money(plan):
    result = plan()
    assert result.exit_code == 0, result.output
    assert "2.5 epochs" in result.stdout
    assert "0.4 device-hours for the whole store" in result.stdout
    for word in ("writing", "a month", "reading all", "in money"):
        assert word not in result.stdout


def test_the_table_has_a_row_per_encoding_and_a_column_per_price(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    prices = ["--gpu-hour-price=3600", "--gb-month-price=1000000", "--put-price=1000", "--get-price=2000"]
    result = plan("--compare=float32,int8,topk:2,topk:9", "--temperature=4", *prices)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if "epochs" in line and "│" in line]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert [row[0] for row in cells] == ["int8", "float32", "topk:2", "topk:9, stored as int8"]
    month = (2 * INT8_VIEW + TABLES) / 1000
    money = ["1,476.00", f"{month:,.2f}", "28.00", f"{(1476 + month) / 707:,.1f} epochs"]
    assert cells[0][1:] == ["14", "59.1 kB", "26", "34", "7", "2.5 epochs", *money]
    # Reading back was measured for each encoding.
    assert cells[1][6] == "4.0 epochs"
    assert "warning: topk:2 is planned for temperature 4. Above 2, " in result.stderr
    assert "topk:9" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_and_the_speed_of_another_device(plan):
    result = plan("--json", "--images-per-second=4", "--gpu-hour-price=36")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["rows"], told["rows_left"]) == (2884, 2884)
    (found,) = told["encodings"]
    assert found["device_hours"] == pytest.approx(721 / 3600)
    assert found["break_even_epochs"] is None, "reading takes as long as the teacher"
    assert found["writing"] == pytest.approx(7.21)
    assert (found["month"], found["reading_all"]) == (None, None)
    assert found["break_even_money_epochs"] == pytest.approx(2)
    assert "one device" in plan("--images-per-second=4").stdout


def test_wrong_numbers_are_refused(plan):
    for word in ("--gpu-hour-price=-1", "--put-price=free", "--temperature=0", "--images-per-second=0"):
        result = plan(word)
        assert (result.exit_code, word.partition("=")[0] in result.stderr) == (2, True), word
    result = plan("--compare=int8,fp16")
    assert (result.exit_code, "unknown encoding 'fp16'" in result.stderr) == (1, True)
