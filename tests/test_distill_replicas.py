"""Replicas that exchange weights through a folder or a bucket: the same objects and the same guarantees."""

import json
import os
import re
import signal
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from moments import at_rename, die, in_turn, stop, with_variables
from spawned import free_port, run, running
from test_distill_codistillation import one_step, replica, wait_for
from test_distill_peers_refused import DIGITS, refusal

from coursepack.data.store.locations import open_location, s3
from coursepack.distill.cli import main
from coursepack.distill.exchange.group_files import weights_key
from coursepack.distill.exchange.replicas import Replicas, parse_weights
from coursepack.distill.runs.folder import load_run
from coursepack.errors import RunBusy, RunError

integration = pytest.mark.integration
METHOD = ("--student", "digits-small", *DIGITS, "--method", "codistillation")
MOST = 1 << 24


SCHEMES = {"bucket": "s3", "google_bucket": "gs", "container": "az"}
BUCKET, *OTHERS = (pytest.param(name, marks=integration) for name in SCHEMES)


@pytest.fixture(params=["folder", BUCKET])
def group(request, tmp_path):
    """Address of a group that does not exist yet."""
    if request.param == "folder":
        return str(tmp_path / "group")
    return f"{SCHEMES[request.param]}://{request.getfixturevalue(request.param)}/deep/group"


@pytest.fixture
def at_once(monkeypatch):
    """Exchange objects of a bucket within the step, as files are, and do not repeat a request that fails."""
    monkeypatch.setattr(Replicas, "_begin", lambda self, transfer: self._finish(transfer))
    monkeypatch.setattr(s3, "RETRIES", {**s3.RETRIES, "max_retries": 0})


@pytest.fixture
def down(group, request):
    """`down(True)` makes the group unreachable, `down(False)` reachable."""

    def of_folder(is_down):
        folder, aside = Path(group), Path(f"{group}-aside")
        if is_down:
            folder.rename(aside)
            folder.touch()
        else:
            folder.unlink()
            aside.rename(folder)

    def of_bucket(is_down):
        request.getfixturevalue("s3_server").is_down = is_down

    return of_bucket if group.startswith("s3:") else of_folder


def held(group, index):
    """Weights of a replica, counted from 0, in its group, and their number of steps."""
    return parse_weights(open_location(group).get(weights_key(index), MOST))


@pytest.mark.parametrize("group", ["folder", BUCKET, *OTHERS], indirect=True)
def test_what_is_in_a_group(group, at_once):
    (first,), steps = replica(0, group)
    _, others = replica(1, group)
    one_step(steps)
    weights = deepcopy(first.learner.network.module.state_dict())
    assert "mutual" in one_step(others), "the first replica's weights are there before the second starts"
    one_step(steps)
    found, count = held(group, 0)
    assert (count, found.keys()) == (1, weights.keys())
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert [name for name in open_location(group).names("") if name != "lock"] == [
        *("group.json", "replica-1.json", "replica-1.safetensors"),
        *("replica-2.json", "replica-2.safetensors"),
    ]
    claim = json.loads(open_location(group).get("replica-2.json", MOST))
    assert claim.keys() == {"token", "host", "pid", "started"}
    assert claim["pid"] == os.getpid()


def test_of_two_processes_with_one_number_the_later_goes_on(group, at_once):
    (first,), steps = replica(0, group, objective={"exchange": {"burn_in": 1}})
    _, others = replica(0, group, objective={"exchange": {"burn_in": 1}})
    one_step(steps)
    one_step(others)
    with pytest.raises(RunBusy) as error:
        one_step(steps)
    assert re.sub(r"at 20\S+Z", "at TIME", str(error.value)) == (
        f"replica 1 of group {group!r} was taken over by process {os.getpid()} on {os.uname().nodename!r}, "
        "which started later, at TIME. If both were meant to run, give each a number of its own with "
        "--replica I/3; to go on with this run instead, stop that process and repeat the command with "
        "--resume"
    )
    for _ in range(3):
        one_step(others)
    assert held(group, 0)[1] == 3
    assert first.learner.exchange.record.moved == 0, "it wrote nothing over the other's weights"


def test_a_process_that_starts_again_does_not_wait(group, at_once):
    """The claim of the one that was killed is still there."""
    _, killed = replica(0, group)
    _, others = replica(1, group)
    one_step(others)
    one_step(killed)
    _, again = replica(0, group)
    assert "mutual" in one_step(again)
    one_step(again)
    assert held(group, 0)[1] == 1


@pytest.mark.parametrize("text", [None, b"", b"{}", b"\xff", b'{"token": 1}', b" " * (1 << 17)])
def test_a_claim_that_is_lost_or_damaged_is_written_again(group, at_once, text):
    """It may be of a group from a version without claims."""
    _, steps = replica(0, group)
    one_step(steps)
    location = open_location(group)
    claim = location.get("replica-1.json", MOST)
    location.delete("replica-1.json")
    if text is not None:
        location.put("replica-1.json", text)
    one_step(steps)
    assert location.get("replica-1.json", MOST) == claim
    assert held(group, 0)[1] == 1


def test_a_replica_goes_on_while_its_group_cannot_be_reached(group, at_once, down, capsys):
    (state,), steps = replica(0, group)
    _, others = replica(1, group)
    one_step(others)
    one_step(steps)
    capsys.readouterr()
    down(True)
    for _ in range(3):
        assert "mutual" in one_step(steps), "the weights that it has are followed"
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"group {group!r} cannot be reached: ")
    assert printed.endswith(
        ". This replica goes on with the weights of the others that it has, and tries again at every "
        "exchange.\n"
    )
    record = state.learner.exchange.record
    assert (record.missed, record.staleness, record.alone) == (3, 0 + 1 + 2 + 3, 0)
    down(False)
    one_step(others)
    one_step(steps)
    assert capsys.readouterr().err == f"group {group!r} is reached again; exchanges that failed: 3\n"
    assert held(group, 0)[1] == 4
    assert (record.missed, record.staleness) == (3, 6 + 3), "the new weights are followed"
    down(True)
    one_step(steps)
    assert "cannot be reached" in capsys.readouterr().err, "every time it begins"
    assert state.learner.exchange.epoch_metrics()["missed"] == 4
    down(False)


def test_a_group_that_cannot_be_used_is_refused_before_the_run_begins(group, at_once, down, tmp_path):
    words = [*METHOD, "--replica", "1/2", "--group", group]
    _, steps = replica(0, group)
    one_step(steps)
    down(True)
    printed = refusal(tmp_path / "o", *words)
    down(False)
    if group.startswith("s3:"):
        assert printed.startswith(f"Error: group {group!r} cannot be used: ")
        assert printed.endswith(
            ". Check the address, the endpoint and the credentials of the bucket, or give another --group"
        )
    else:
        assert printed.startswith(f"Error: '{group}/group.json' cannot be read (")
        assert printed.endswith("): give another --group")


def test_a_group_that_cannot_be_written_to_is_refused(group, at_once, monkeypatch):
    _, steps = replica(0, group)

    def refused(location, key, *_):
        raise PermissionError(13, "Permission denied", location.where(key))

    monkeypatch.setattr(type(open_location(group)), "put", refused)
    text = f"group {group!r} cannot be used: Permission denied. Check the "
    with pytest.raises(RunError, match=re.escape(text)):
        one_step(steps)


def test_a_dry_run_writes_nothing(group):
    words = ["train", *METHOD, "--replica", "1/2", "--group", group, "--dry-run"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert f"group: {group}\n" in result.stdout
    assert open_location(group).names("") == []


def test_a_group_of_another_recipe(group, at_once):
    _, steps = replica(0, group)
    one_step(steps)
    with pytest.raises(RunError) as error:
        replica(1, group, batch_size=8)
    assert str(error.value) == (
        f"group {group!r} is of other replicas.\n"
        "  recipe.batch_size   group: 16   this run: 8\n"
        "Train with the values of the group, or give another --group."
    )


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (
            "s3://bucket",
            "address 's3://bucket' of a group is not s3://BUCKET/PATH: give the bucket and the path of the "
            "group in it",
        ),
        (
            "s4://bucket/group",
            "unknown kind of location 's4://'. Did you mean 's3://'? Known: file://, s3://, gs://, az://.",
        ),
    ],
)
def test_addresses_that_are_wrong(tmp_path, address, text):
    assert refusal(tmp_path / "o", *METHOD, "--replica", "1/3", "--group", address) == f"Error: {text}"


def test_a_bucket_without_the_extra(tmp_path, monkeypatch):
    for name in ("obstore", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    printed = refusal(tmp_path / "o", *METHOD, "--replica", "1/3", "--group", "gs://bucket/group")
    assert printed.startswith("Error: group 'gs://bucket/group' needs obstore, which cannot be imported: ")
    assert printed.endswith(". Get it with `pip install 'coursepack[s3]'`")


def test_a_replica_beyond_their_number_opens_no_bucket(tmp_path):
    words = [*METHOD, "--replica", "4/3", "--group", "s3://nowhere/group"]
    assert refusal(tmp_path / "o", *words) == (
        "Error: --replica is '4/3', expected I/N with I from 1 to N, and N of at least 2, such as 1/3"
    )


@integration
def test_a_bucket_that_is_wrong(tmp_path, bucket, s3_server, at_once, monkeypatch):
    check = "Check the address, the endpoint and the credentials of the bucket, or give another --group"

    def refused(address):
        return refusal(tmp_path / "o", *METHOD, "--replica", "1/3", "--group", address)

    assert refused("s3://nowhere/group") == (
        f"Error: group 's3://nowhere/group' cannot be used: There is no such bucket. {check}"
    )
    s3_server.fail("forbidden", method="GET")
    printed = refused(f"s3://{bucket}/group")
    assert printed.startswith(
        f"Error: group 's3://{bucket}/group' cannot be used: The server refuses the credentials: "
    )
    assert printed.endswith(check)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    printed = refused(f"s3://{bucket}/group")
    assert printed.startswith(f"Error: group 's3://{bucket}/group' cannot be used: ")
    assert printed.endswith(check)


@integration
def test_a_server_that_ignores_conditions_will_do(bucket, s3_server, at_once):
    s3_server.keeps_conditions = False
    group = f"s3://{bucket}/group"
    _, steps = replica(0, group)
    _, others = replica(1, group)
    one_step(steps)
    assert "mutual" in one_step(others)


@integration
def test_training_goes_on_while_objects_travel(bucket, s3_server):
    group = f"s3://{bucket}/group"
    (state,), steps = replica(0, group)
    _, others = replica(1, group)
    one_step(others)
    assert "mutual" in one_step(steps), "the first step waits for the weights that are there"
    s3_server.fail("slow", key="replica-1.safetensors")
    one_step(steps)
    record = state.learner.exchange.record
    before = record.moved
    for number in range(4):
        one_step(steps)
        assert (record.missed, record.moved) == (number + 1, before)
    time.sleep(2.5)
    one_step(steps)
    assert record.missed == 4
    assert record.moved > before
    deadline = time.monotonic() + 60
    while held(group, 0)[1] != 6:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@integration
def test_no_replica_waits_for_another_at_a_bucket(tmp_path, bucket, s3_server):
    """One is killed and one is stopped; the third ends, and so do they later."""
    group, marker = f"s3://{bucket}/group", tmp_path / "stopped"
    words = ["--student", "digits-small", "--method", "codistillation", "--source", "digits", "--view"]
    words += ["digits", "--limit", 300, "--batch-size", 32, "--epochs", 6, "--checkpoint-seconds", 0]
    words += ["--set", "objective.exchange.every=2", "--group", group]
    variables = partial(with_variables, s3_server.environment)

    def command(index, out=None):
        where = tmp_path / (out or f"r{index}")
        return ["distill", "train", *words, "--replica", f"{index}/3", "--out", where]

    stops = partial(in_turn, variables, partial(at_rename, 5, partial(stop, marker), "checkpoint.pt"))
    dies = partial(in_turn, variables, partial(at_rename, 5, die, "checkpoint.pt"))
    with running(*command(3), before=stops) as (process, finished):
        killed = run(*command(2), before=dies)
        assert killed.returncode == -signal.SIGKILL
        wait_for(marker)
        alone = run(*command(1), before=variables)
        assert alone.returncode == 0, alone.stderr
        again = run(*command(2), "--resume", before=variables)
        assert again.returncode == 0, again.stderr
        assert f"resuming {tmp_path / 'r2'} in epoch " in again.stderr
        twice = run(*command(3, "other"), before=variables)
        assert twice.returncode == 0, twice.stderr
        assert process.is_alive(), "it was stopped all the time"
        os.kill(process.pid, signal.SIGCONT)
        last = finished()
    assert last.returncode == 1
    assert f"Error: replica 3 of group '{group}' was taken over by process " in last.stderr
    ended = run(*command(3), "--resume", before=variables)
    assert ended.returncode == 0, ended.stderr
    assert open_location(group).names("") == [
        "group.json", *(f"replica-{index}.{kind}" for index in (1, 2, 3) for kind in ("json", "safetensors")),
    ]  # fmt: skip
    exchanged = [load_run(tmp_path / f"r{index}").metrics[0]["exchange"] for index in (1, 2, 3)]
    assert exchanged[0]["peers"] == 2.0
    assert exchanged[0]["steps_alone"] == 0
    runs = [str(tmp_path / f"r{index}") for index in (1, 2, 3)]
    assert CliRunner().invoke(main, ["compare", *runs]).exit_code == 0
