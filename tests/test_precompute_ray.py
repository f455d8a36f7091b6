"""The Ray executor on clusters of several nodes of this machine: same bytes, whatever is killed and when."""

import contextlib
import importlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from benchmark_rows import check_rows
from clusters import MARKS, wait_until
from helpers import file_identities, store_files
from spawned import run, running

from coursepack.data import PRESETS
from coursepack.data.store import load_manifest, verify
from coursepack.errors import NonFiniteOutput, RecipeError, WorkerLost, WorkerMismatch
from coursepack.precompute import run_job
from coursepack.precompute.executors import RayExecutor
from coursepack.precompute.spec import PrecomputeSpec

pytestmark = MARKS
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
VIEWS, BATCH, BLOCK_ROWS = 2, 100, 500
BLOCK_BATCHES = 5
BATCHES = VIEWS * (1442 // BATCH + 1)


def write(cluster, store, actors=None):
    """What the command does in the driver."""
    executor = RayExecutor(cluster.address, actors)
    return run_job(make_spec(store).job(elsewhere=True), executor=executor, quiet=True)


def make_spec(store):
    facts = {"weights": "own", "batch_size": BATCH, "block_rows": BLOCK_ROWS, "device": "cpu"}
    view = PRESETS["digits"].model_dump(mode="json")
    return PrecomputeSpec("python:cluster_teacher:Teacher", "digits", view, str(store), VIEWS, **facts)


def assert_same(store, expected):
    assert store_files(store) == expected
    assert verify(store).problems == ()
    assert not list(store.rglob("*.partial"))
    assert not list(store.rglob("*.witness"))


@pytest.fixture(scope="module")
def expected(started, tmp_path_factory):
    """The files of a store that this process wrote alone."""
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    run_job(make_spec(path).job(), quiet=True)
    return store_files(path)


def test_the_block_of_a_killed_worker_is_computed_again_and_no_other(tmp_path, cluster, expected):
    (cluster.folder / "once").touch()
    write(cluster, tmp_path / "s.zarr")
    assert_same(tmp_path / "s.zarr", expected)
    assert BATCHES < len(cluster.batches()) <= BATCHES + BLOCK_BATCHES
    assert len(set(cluster.batches())) > 1


def test_a_node_dies_and_another_joins(tmp_path, cluster, expected):
    with ThreadPoolExecutor(1) as pool:
        with cluster.held(after=0):
            written = pool.submit(write, cluster, tmp_path / "s.zarr")
            wait_for_workers(cluster, written, 2)
            cluster.remove(cluster.nodes.pop())
            cluster.nodes.append(cluster.add())
            wait_for_workers(cluster, written, 3)
        assert written.result().committed_views() == (0, 1)
    assert_same(tmp_path / "s.zarr", expected)
    assert BATCHES < len(cluster.batches()) <= BATCHES + BLOCK_BATCHES
    assert len(set(cluster.batches())) == 3


def wait_for_workers(cluster, written, count):
    """Wait until so many workers have had a batch of a store that is being written."""
    wait_until(
        lambda: len(set(cluster.batches())) == count, lambda: written.result() if written.done() else None
    )


def done_blocks(store):
    """View and index of every block that needs no more work."""
    if not (store / "manifest.json").is_file():
        return set()
    blocks = -(-1442 // BLOCK_ROWS)
    whole = {(view, block) for view in load_manifest(store).committed_views() for block in range(blocks)}
    return whole | {tuple(map(int, path.name.split(".")[:2])) for path in (store / "blocks").glob("*.json")}


def test_a_driver_that_was_killed_goes_on(tmp_path, cluster, expected):
    store = tmp_path / "s.zarr"
    words = ["precompute", "run", "--teacher=python:cluster_teacher:Teacher", "--weights=own"]
    words += ["--source=digits", "--view=digits", f"--views={VIEWS}", f"--store={store}", "--device=cpu"]
    words += [f"--batch-size={BATCH}", f"--block-rows={BLOCK_ROWS}"]
    words += ["--executor=ray", f"--address={cluster.address}", "--actors=1"]
    with cluster.held(after=2 * BLOCK_BATCHES + 1), running(*words) as (process, finished):
        wait_until(lambda: len(done_blocks(store)) > 1, lambda: None if process.is_alive() else finished())
        process.kill()
        finished()
    done, files = done_blocks(store), file_identities(store)
    assert done
    kept = {place: files[place] for place in files if block_of(place) in done}
    result = run(*words)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    after = file_identities(store)
    assert {place: after[place] for place in kept} == kept
    assert_same(store, expected)
    assert len(cluster.batches()) <= BATCHES + BLOCK_BATCHES


def block_of(place):
    """View and index of the block that a data file belongs to; here a block is one file."""
    found = re.match(r"logits/values/c\.(\d+)\.(\d+)", place)
    return found and tuple(map(int, found.groups()))


def test_a_worker_with_other_numerics_is_refused_before_the_first_block(tmp_path, cluster):
    other = "default" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "avx2"
    node = cluster.add(env_vars={"ATEN_CPU_CAPABILITY": other})
    try:
        with pytest.raises(WorkerMismatch, match=r"numerics(.|\n)* cpu_capability .*first: .*this one: "):
            write(cluster, tmp_path / "s.zarr")
    finally:
        cluster.remove(node)
    assert not (tmp_path / "s.zarr").exists()
    assert cluster.batches() == []


def test_a_block_that_kills_three_workers_is_named(tmp_path, cluster):
    (cluster.folder / "poison").touch()
    text = r"block 2 \(samples 1,000 to 1,441\) of view \d was lost with its worker 3 times"
    with pytest.raises(WorkerLost, match=text):
        write(cluster, tmp_path / "s.zarr", actors=1)
    assert len(set(cluster.batches())) == 3
    assert len(done_blocks(tmp_path / "s.zarr")) == 2


def test_an_error_of_the_teacher_is_the_runs(tmp_path, cluster):
    (cluster.folder / "nan").touch()
    with pytest.raises(NonFiniteOutput, match="gives logits that are not finite"):
        write(cluster, tmp_path / "s.zarr", actors=1)
    assert len(cluster.batches()) <= BLOCK_BATCHES


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        (
            "127.0.0.1:1",
            WorkerLost,
            r"cannot connect to a Ray cluster at '127.0.0.1:1': .*refused",
        ),
        ("ray://head:10001", RecipeError, "one of Ray Client.*ray job submit"),
    ],
)
def test_a_wrong_address_is_refused_at_once(tmp_path, cluster, address, error, text):
    with pytest.raises(error, match=text):
        run_job(make_spec(tmp_path / "s.zarr").job(), executor=RayExecutor(address), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick", "--json", str(rows)])
    # A bar that does not hold at the tiny size is no news.
    with contextlib.suppress(SystemExit):
        importlib.import_module("scaling").main()
    assert check_rows(rows)
    assert "workers" in capsys.readouterr().out
