"""The warning of temperatures that are too high for top-k rows."""

from __future__ import annotations

import re
import shlex

import pytest
from builders import make_recipe, write_store, write_teacher
from click.testing import CliRunner

from coursepack.data.store import StoreReader
from coursepack.data.store.records import fidelity_summary
from coursepack.distill.setup import fidelity
from coursepack.distill.setup.fidelity import temperature_warnings
from coursepack.precompute.cli import main as precompute


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fidelity")
    return StoreReader(write_store(folder / "s.zarr", write_teacher(folder / "t"), encoding="topk:2"))


def warnings_at(reader, temperature, **fields):
    recipe = make_recipe([reader.address], objective={"temperature": temperature}, **fields)
    return temperature_warnings(recipe, [reader])


def test_a_temperature_that_the_rows_do_not_support_is_said(reader):
    mean = fidelity_summary(reader.manifest.view_records["0"]["fidelity"])["T=4"]["mean"]
    assert 16 * mean > 0.5
    for temperature in (4.0, 20.0, {"shape": "warmup", "start": 8.0, "end": 1.0, "epochs": 2}):
        (warning,) = warnings_at(reader, temperature)
        assert f"T² KL to the teacher is {16 * mean:.2g} nats, more than 0.5." in warning
        assert f"the rows of store {reader.address!r} (topk:2) support temperatures up to" in warning
    limit = float(re.search(r"temperatures up to ([\d.]+)", warning)[1])
    assert 1 < limit < 4
    assert warnings_at(reader, limit - 0.1) == []
    assert len(warnings_at(reader, limit + 0.1)) == 1


def test_the_command_that_it_names_writes_a_store_that_will_do(reader, tmp_path):
    (warning,) = warnings_at(reader, 4.0)
    assert "or as int4, in half the bytes" in warning
    words = shlex.split(warning.splitlines()[1])
    result = CliRunner().invoke(precompute, words[1:])
    assert result.exit_code == 0, result.output
    dense = StoreReader(words[words.index("--store") + 1])
    assert dense.manifest.arrays["logits"].encoding.name == "int8"
    assert warnings_at(dense, 20.0) == []
    words[words.index("int8")], words[words.index("--store") + 1] = "int4", str(tmp_path / "half.zarr")
    assert CliRunner().invoke(precompute, words[1:]).exit_code == 0
    assert warnings_at(StoreReader(tmp_path / "half.zarr"), 20.0) == []


def test_int4_rows_are_measured_as_sparse_ones_are(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "LARGEST_ERROR", 1e-9)
    teacher = write_teacher(tmp_path / "t")
    for encoding in ("int4", "int8"):
        store = write_store(tmp_path / f"{encoding}.zarr", teacher, encoding=encoding)
        found = warnings_at(StoreReader(store), 4.0)
        assert len(found) == (encoding == "int4")
        assert all("(int4) support no temperature" in each and "or as int4" not in each for each in found)


def test_nothing_is_said_where_the_temperature_is_not_used(reader):
    assert warnings_at(reader, 1.0) == []
    assert warnings_at(reader, 0.1) == []
    assert warnings_at(reader, 4.0, online=True) == []
    recipe = make_recipe([reader.address], method="supervised")
    assert temperature_warnings(recipe, [reader]) == []
