"""Real processes that write one store: in any order, at once, killed at any moment, asked to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import file_identities, make_job, store_files

from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.errors import StoreBusy, StoreIncomplete
from coursepack.models.taps import Tap
from coursepack.precompute import run_job

COMMAND = Path(sys.executable).parent / "precompute"
VIEWS, BLOCK_ROWS = 2, 24
BLOCKS = -(-1442 // BLOCK_ROWS)
OPTIONS = {"views": VIEWS, "taps": (Tap(("hidden2",)),), "batch_size": 10, "block_rows": BLOCK_ROWS}
# One thread each, here and there: sums in another order would change the last bits of logits.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(sys.path)

# Imports once, then runs the command again and again in forked processes that are to be killed.
FORK_SERVER = """
import os, sys, json
from coursepack.precompute.cli import main
import coursepack.data.jit_pixels, coursepack.data.jit_philox
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        main(json.loads(line))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
# The same where a process is to die before a rename of its own, given before its words.
DYING_SERVER = """
import os, sys, json
from moments import at_rename, die
from coursepack.precompute.cli import main
import coursepack.data.jit_pixels, coursepack.data.jit_philox
for line in sys.stdin:
    moment, words = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        at_rename(moment[0], die, moment[1])
        main(words)
    print(os.waitpid(child, 0)[1], flush=True)
"""
BEGINNING = ((1, "c.0"), (2, "c.0"), (1, "c.0.0"), (1, "manifest.json"))
"""Before a rename, counted from 1, onto a file of that name: of tables and the first manifest."""
HELD = (
    "import sys; from moments import at_rename, hold; from coursepack.precompute.cli import main; "
    "marker = sys.argv.pop(); at_rename(50, lambda: hold(marker)); main()"
)


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
    subprocess.run([COMMAND, *arguments, f"--store={path}"], env=ENVIRONMENT, check=True, capture_output=True)
    assert load_manifest(path).committed_views() == (0, 1)
    return store_files(path)


@contextmanager
def running(command):
    """A process with pipes, which does not outlive the test."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A run in the background ignores SIGINT, and so would what it starts.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes) as process:
        try:
            signal.signal(signal.SIGINT, previous)
            yield process
        finally:
            process.kill()


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
    commands = [[COMMAND, *arguments, f"--store={path}", f"--part={index}/2"] for index in range(2)]
    with running(commands[0]) as one, running(commands[1]) as two:
        for part in (one, two):
            _, errors = part.communicate(timeout=300)
            assert part.returncode == 0, errors
    assert_same(path, once)


def test_a_dozen_kills_at_many_moments_give_the_same_bytes(tmp_path, arguments, once):
    rng = np.random.default_rng(0)
    path = tmp_path / "s.zarr"
    words = [*arguments, f"--store={path}"]
    with running([sys.executable, "-c", DYING_SERVER]) as server:

        def run(*moment):
            server.stdin.write(json.dumps([moment, words]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        kept = {}
        for kill in range(14):
            before = done_blocks(path)
            # The first kills fall while the store is begun, the others in the next eight blocks of 3 renames.
            moment = BEGINNING[kill] if kill < len(BEGINNING) else (int(rng.integers(1, 25)), None)
            assert run(*moment) == signal.SIGKILL
            done, shards = done_blocks(path), shard_identities(path)
            assert done >= before
            # Nothing that was done is written again, and at most one block is begun and not done.
            assert {block: shards[block] for block in kept} == kept
            assert len(shards.keys() - done) <= 1
            assert all(len(shards[block]) == 2 for block in done)
            kept = {block: shards[block] for block in done}
        assert 0 < len(kept) < VIEWS * BLOCKS
        assert run(-1, None) == 0, server.stderr.read()
    assert {block: shard_identities(path)[block] for block in kept} == kept
    assert_same(path, once)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_says_so_and_can_go_on(tmp_path, teacher, arguments, once, number):
    path = tmp_path / "s.zarr"
    marker = tmp_path / "held"
    with running([sys.executable, "-c", HELD, *arguments, f"--store={path}", str(marker)]) as process:
        wait_until(marker.exists)
        text = (
            rf"process {process.pid} on \S+ is writing part 0/1 of store .* since .*`--part I/COUNT` in both"
        )
        with pytest.raises(StoreBusy, match=text):
            run_job(make_job(path, teacher, **OPTIONS))
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped. Finished blocks are kept; run the same command again to finish" in errors
    assert "Traceback" not in errors
    done = done_blocks(path)
    assert 0 < len(done) < VIEWS * BLOCKS
    if load_manifest(path).committed_views() == ():
        with pytest.raises(StoreIncomplete, match="Run the same `precompute run` again"):
            StoreReader(path)
    kept = file_identities(path)
    subprocess.run([COMMAND, *arguments, f"--store={path}"], env=ENVIRONMENT, check=True, capture_output=True)
    after = file_identities(path)
    shards = shard_identities(path)
    assert all(kept[place] == after[place] for block in done for place in shards[block])
    assert_same(path, once)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_hundred_kills_of_runs_of_one_or_two_processes(tmp_path, arguments, once, processes):
    rng = np.random.default_rng(processes)
    commands = [f"--part={index}/{processes}" for index in range(processes)]
    command = [sys.executable, "-c", FORK_SERVER]
    landed, rounds = 0, 0
    with ExitStack() as stack:
        servers = [stack.enter_context(running(command)) for _ in range(processes)]

        def start(server, path, part):
            server.stdin.write(json.dumps([*arguments, f"--store={path}", part]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        while landed < 100:
            path, kept = tmp_path / f"{rounds}.zarr", {}
            rounds += 1
            for kill in range(12):
                before = done_blocks(path)
                if len(before) > VIEWS * BLOCKS - 20:
                    break
                started = time.monotonic()
                children = [start(*pair) for pair in zip(servers, [path] * processes, commands, strict=True)]
                if kill >= 3:
                    goal = len(before) + int(rng.integers(1, 12))
                    wait_until(lambda goal=goal, path=path: shards_written(path) >= goal)
                time.sleep(rng.uniform(0, 0.3 if kill < 3 else 0.02))
                for child in rng.permutation(children):
                    with suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)
                    time.sleep(rng.uniform(0, 0.005))
                statuses = [int(server.stdout.readline()) for server in servers]
                assert set(statuses) <= {0, signal.SIGKILL}, time.monotonic() - started
                landed += statuses.count(signal.SIGKILL)
                done, shards = done_blocks(path), shard_identities(path)
                assert done >= before
                assert {block: shards[block] for block in kept} == kept
                assert len(shards.keys() - done) <= processes
                kept = {block: shards[block] for block in done}
            for server, part in zip(servers, commands, strict=True):
                start(server, path, part)
                assert server.stdout.readline().strip() == "0"
            assert {block: shard_identities(path)[block] for block in kept} == kept
            assert_same(path, once)
