"""Real processes that write one store: in any order, at once, killed at any moment, asked to stop."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import file_identities, make_job, store_files
from moments import at_batch, at_rename, die, hold, wait_for
from spawned import run, running

from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.errors import StoreBusy, StoreIncomplete
from coursepack.models.taps import Tap
from coursepack.precompute import run_job

VIEWS, BLOCK_ROWS = 2, 48
BLOCKS = -(-1442 // BLOCK_ROWS)
OPTIONS = {"views": VIEWS, "taps": (Tap(("hidden2",)),), "batch_size": 10, "block_rows": BLOCK_ROWS}

SIGNALS = [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.integration)]
BEGINNING = ((1, "c.0"), (2, "c.0"), (1, "c.0.0"), (1, "manifest.json"))
"""Before a rename, counted from 1, onto a file of that name: of tables and the first manifest."""


@pytest.fixture(scope="module")
def arguments(teacher):
    """The command's arguments, all but the store."""
    pairs = {
        "teacher": f"run:{teacher}",
        "source": "digits",
        "view": "digits",
        "views": VIEWS,
        "tap": "hidden2",
    }
    pairs |= {"batch-size": 10, "block-rows": BLOCK_ROWS, "device": "cpu", "encoding": "float16"}
    return ["run", *(f"--{name}={value}" for name, value in pairs.items())]


@pytest.fixture(scope="module")
def once(tmp_path_factory, arguments):
    """The files of a store that one process wrote in one go."""
    path = tmp_path_factory.mktemp("once") / "s.zarr"
    written = run("precompute", *arguments, f"--store={path}")
    assert written.returncode == 0, written.stderr
    assert load_manifest(path).committed_views() == (0, 1)
    return store_files(path)


def assert_same(path, expected):
    found = store_files(path)
    assert sorted(found) == sorted(expected)
    assert [place for place in found if found[place] != expected[place]] == []
    assert verify(path).problems == ()


def shards_written(path):
    folder = path / "logits/values"
    return len([file for file in folder.iterdir() if file.name[-1].isdigit()]) if folder.is_dir() else 0


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


def done_blocks(path):
    """Blocks that need no more work, `(view, block)`, as the store says it."""
    if not (path / "manifest.json").is_file():
        return set()
    committed = load_manifest(path).committed_views()
    names = [file.name.split(".") for file in (path / "blocks").glob("*.json")]
    return {(int(view), int(block)) for view, block, _ in names} | {
        (view, block) for view in committed for block in range(BLOCKS)
    }


def shard_identities(path):
    """Identity of the data files of every block `(view, block)`; here a block is one shard of each array."""
    found: dict[tuple[int, int], dict] = {}
    for place, identity in file_identities(path).items():
        if not place.startswith(("labels", "static")) and not place.endswith(".partial"):
            view, block = map(int, Path(place).name.split(".")[1:3])
            found.setdefault((view, block), {})[place] = identity
    return found


def test_any_order_of_blocks_gives_the_same_bytes(tmp_path, teacher, once):
    order = np.random.default_rng(0).permutation(VIEWS * BLOCKS).tolist()
    run_job(make_job(tmp_path / "s.zarr", teacher, **OPTIONS), block_order=iter(order))
    assert_same(tmp_path / "s.zarr", once)


def test_two_processes_at_once_give_the_same_bytes(tmp_path, arguments, once):
    path = tmp_path / "s.zarr"
    words = ["precompute", *arguments, f"--store={path}"]
    with running(*words, "--part=0/2") as (_, one), running(*words, "--part=1/2") as (_, two):
        for finished in (one, two):
            part = finished()
            assert part.returncode == 0, part.stderr
    assert_same(path, once)


@pytest.mark.parametrize(
    ("beginning", "kills"), [(BEGINNING[-1:], 3), pytest.param(BEGINNING, 14, marks=pytest.mark.integration)]
)
def test_kills_at_many_moments_give_the_same_bytes(tmp_path, arguments, once, beginning, kills):
    rng = np.random.default_rng(0)
    path = tmp_path / "s.zarr"
    words, kept = ["precompute", *arguments, f"--store={path}"], {}
    for kill in range(kills):
        before = done_blocks(path)
        # The first kills fall while the store is begun, the others in the next eight blocks of 3 renames.
        number, name = beginning[kill] if kill < len(beginning) else (int(rng.integers(1, 25)), None)
        killed = run(*words, before=partial(at_rename, number, die, name))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        done, shards = done_blocks(path), shard_identities(path)
        assert done >= before
        # Nothing that was done is written again, and at most one block is begun and not done.
        assert {block: shards[block] for block in kept} == kept
        assert len(shards.keys() - done) <= 1
        assert all(len(shards[block]) == 2 for block in done)
        kept = {block: shards[block] for block in done}
    assert 0 < len(kept) < VIEWS * BLOCKS
    last = run(*words)
    assert last.returncode == 0, last.stderr
    assert {block: shard_identities(path)[block] for block in kept} == kept
    assert_same(path, once)


@pytest.mark.parametrize("number", SIGNALS)
def test_asked_to_stop_it_says_so_and_can_go_on(tmp_path, teacher, arguments, once, number):
    path = tmp_path / "s.zarr"
    marker = tmp_path / "held"
    words = ["precompute", *arguments, f"--store={path}"]
    with running(*words, before=partial(at_rename, 50, partial(hold, marker))) as (process, finished):
        wait_until(marker.exists)
        text = (
            rf"process {process.pid} on \S+ is writing part 0/1 of store .* since .*`--part I/COUNT` in both"
        )
        with pytest.raises(StoreBusy, match=text):
            run_job(make_job(path, teacher, **OPTIONS))
        os.kill(process.pid, number)
        stopped = finished()
    assert stopped.returncode == 130
    assert "stopped. What is finished is kept; run the same command again to finish" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    done = done_blocks(path)
    assert 0 < len(done) < VIEWS * BLOCKS
    if load_manifest(path).committed_views() == ():
        with pytest.raises(StoreIncomplete, match="Run the same `precompute run` again"):
            StoreReader(path)
    kept = file_identities(path)
    assert run(*words).returncode == 0
    after = file_identities(path)
    shards = shard_identities(path)
    assert all(kept[place] == after[place] for block in done for place in shards[block])
    assert_same(path, once)


@pytest.fixture
def slow(tmp_path, arguments):
    """The command with a teacher whose fortieth batch is slow: words, what makes it so, and three files."""
    marker, release, log = (tmp_path / name for name in ("begun", "release", "log"))
    words = ["precompute", *arguments, f"--store={tmp_path / 's.zarr'}"]
    return words, partial(at_batch, 40, partial(wait_for, marker, release), log), (marker, release, log)


def test_an_interrupt_waits_for_the_batch_of_a_slow_teacher_and_no_other(tmp_path, slow, once):
    words, before, (marker, release, log) = slow
    with running(*words, before=before) as (process, finished):
        wait_until(marker.exists)
        os.kill(process.pid, signal.SIGINT)
        process.join(0.5)
        assert process.exitcode is None
        release.touch()
        stopped = finished()
    assert stopped.returncode == 130
    first, second = stopped.stderr.splitlines()[-2:]
    assert first == "stopping after the current batch; press Ctrl-C again to stop at once"
    assert second.startswith("stopped. What is finished is kept; run the same command again to finish '")
    assert log.stat().st_size == 40
    assert run(*words).returncode == 0
    assert_same(tmp_path / "s.zarr", once)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_torchrun_or_slurm_repeats_waits_for_the_batch(slow, number):
    """A rank is signalled with its launcher, and by it."""
    words, before, (marker, release, log) = slow
    with running(*words, before=before) as (process, finished):
        wait_until(marker.exists)
        for _ in range(2):
            os.kill(process.pid, number)
            process.join(0.2)
        os.kill(process.pid, signal.SIGTERM)
        process.join(1.0)
        os.kill(process.pid, signal.SIGTERM)
        process.join(0.2)
        assert process.exitcode is None
        release.touch()
        stopped = finished()
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines()[-1].startswith("stopped. What is finished is kept;")
    assert log.stat().st_size == 40


@pytest.mark.integration
def test_a_second_interrupt_waits_for_nothing(tmp_path, slow, once):
    words, before, (marker, _, log) = slow
    with running(*words, before=before) as (process, finished):
        wait_until(marker.exists)
        while process.is_alive():
            os.kill(process.pid, signal.SIGINT)
            process.join(0.5)
        stopped = finished()
    assert stopped.returncode == 130
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(
        "stopped at once. What is finished is kept; run the same command again to finish '"
    )
    assert "Traceback" not in stopped.stderr
    assert log.stat().st_size == 40
    assert len(done_blocks(tmp_path / "s.zarr")) < 14
    assert run(*words).returncode == 0
    assert_same(tmp_path / "s.zarr", once)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_hundred_kills_of_runs_of_one_or_two_processes(tmp_path, arguments, once, processes):
    rng = np.random.default_rng(processes)
    parts = [f"--part={index}/{processes}" for index in range(processes)]
    landed, rounds = 0, 0
    while landed < 100:
        path, kept = tmp_path / f"{rounds}.zarr", {}
        words = ["precompute", *arguments, f"--store={path}"]
        rounds += 1
        for kill in range(12):
            before = done_blocks(path)
            if len(before) > VIEWS * BLOCKS - 20:
                break
            with ExitStack() as stack:
                children = [stack.enter_context(running(*words, part)) for part in parts]
                if kill >= 3:
                    goal = len(before) + int(rng.integers(1, 12))
                    wait_until(lambda goal=goal, path=path: shards_written(path) >= goal)
                time.sleep(rng.uniform(0, 0.3 if kill < 3 else 0.02))
                for index in rng.permutation(processes):
                    children[index][0].kill()
                    time.sleep(rng.uniform(0, 0.005))
                statuses = [finished().returncode for _, finished in children]
            assert set(statuses) <= {0, -signal.SIGKILL}
            landed += statuses.count(-signal.SIGKILL)
            done, shards = done_blocks(path), shard_identities(path)
            assert done >= before
            assert {block: shards[block] for block in kept} == kept
            assert len(shards.keys() - done) <= processes
            kept = {block: shards[block] for block in done}
        assert [run(*words, part).returncode for part in parts] == [0] * processes
        assert {block: shard_identities(path)[block] for block in kept} == kept
        assert_same(path, once)
