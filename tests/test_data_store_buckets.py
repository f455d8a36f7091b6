"""Stores in buckets: the same bytes as local ones, whoever writes them and whatever the server does."""

from __future__ import annotations

import base64
import os
import sys
import threading

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from helpers import RowStore, make_job, store_files, write_rows

from coursepack.data.store import StoreReader, StoreWriter, load_manifest, verify
from coursepack.data.store.locations import open_location, s3
from coursepack.data.store.locations.services import SERVICES
from coursepack.data.store.owners import Part, live_runs, owning
from coursepack.errors import RecipeError, StoreBusy, StoreDamaged, StoreMismatch, StoreNotFound
from coursepack.precompute.cli import main as precompute

integration = pytest.mark.integration
BESIDE = ("runs/", "lock")
"""Keys that differ between stores that hold the same."""


@pytest.fixture
def address(home):
    return f"{home}/stores/rows.zarr"


@pytest.fixture
def server(home, request):
    """The server of an address."""
    servers = {"s3": "s3_server", "gs": "google_server", "az": "azure_server"}
    return request.getfixturevalue(servers[home.partition(":")[0]])


@pytest.fixture
def fast(monkeypatch):
    """A client that gives up soon."""
    monkeypatch.setattr(
        s3, "RETRIES", {**s3.RETRIES, "backoff": {"init_backoff": s3.timedelta(milliseconds=5)}}
    )


def objects(address):
    """Every object of a store by its key, except the records under `runs/`."""
    client = open_location(address)._client()
    keys = sorted(str(entry["path"]) for entry in client.list().collect())
    return {key: bytes(client.get(key).bytes()) for key in keys if not key.startswith(BESIDE)}


def local_objects(path):
    return {key: data for key, data in store_files(path).items() if not key.startswith(BESIDE)}


def write_part(address, rows, part, **how):
    with StoreWriter(address, rows.plan(), part, **how) as writer:
        for block in writer.pending():
            rows.write_block(writer, block)
        writer.commit()


@pytest.mark.parametrize(
    "rest", ["", "bucket", "bucket/", "/path", "bucket//path", "bucket/../path", "bucket/."]
)
@pytest.mark.parametrize(("scheme", "word"), [("s3", "BUCKET"), ("gs", "BUCKET"), ("az", "CONTAINER")])
def test_an_address_without_bucket_or_path_is_refused(scheme, word, rest):
    with pytest.raises(RecipeError, match=rf"is not {scheme}://{word}/PATH: give the {word.lower()} and"):
        open_location(f"{scheme}://{rest}")


def test_the_extra_is_named_where_the_library_is_missing(monkeypatch):
    for name in ("obstore", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(precompute, ["status", "--store", "gs://bucket/s.zarr"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: store 'gs://bucket/s.zarr' needs obstore")
    assert result.stderr.endswith("Get it with `pip install 'coursepack[s3]'`\n")


def test_requests_are_unencrypted_only_if_the_services_own_endpoint_is(monkeypatch):
    for service in SERVICES.values():
        for name in service.endpoint:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:10000/account")
    monkeypatch.setenv("GOOGLE_BASE_URL", "https://storage.example.com")
    assert [scheme for scheme, service in SERVICES.items() if service.allows_http()] == ["az"]


@integration
def test_a_store_has_the_bytes_of_a_local_one(address, tmp_path):
    rows = RowStore(views=3)
    write_rows(address, rows)
    write_rows(tmp_path / "s.zarr", rows)
    assert objects(address) == local_objects(tmp_path / "s.zarr")
    assert verify(address).problems == ()
    reader = StoreReader(address)
    assert (reader.name, reader.views) == ("rows", (0, 1, 2))
    assert np.array_equal(reader.components("logits", 2, np.arange(50))["values"], rows.stored("logits", 2))
    found = zarr.open_group(open_location(address).zarr_store(), mode="r")["logits/values"][1]
    assert np.array_equal(found, rows.stored("logits", 1))


@integration
def test_a_store_grows_where_another_run_stopped(address, tmp_path):
    write_rows(address, RowStore(views=1))
    longer = RowStore(views=3)
    with StoreWriter(address, longer.plan()) as writer:
        longer.write_block(writer, next(writer.pending()))
    write_rows(address, longer)
    write_rows(tmp_path / "once.zarr", longer)
    assert objects(address) == local_objects(tmp_path / "once.zarr")


@integration
def test_writers_at_the_same_time_lose_nothing(address, tmp_path):
    rows = RowStore(views=4, samples=96)
    threads = [
        threading.Thread(target=write_part, args=(address, rows, Part(index, 3))) for index in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write_rows(tmp_path / "once.zarr", rows)
    assert StoreReader(address).views == (0, 1, 2, 3)
    assert verify(address).problems == ()
    found, once = objects(address), local_objects(tmp_path / "once.zarr")
    # A list that no manifest names may be left where commits met.
    assert once.items() <= found.items()
    assert all(key.startswith("views/") for key in found.keys() - once.keys())


@integration
def test_one_of_two_that_create_different_stores_is_refused(address):
    first = StoreWriter(address, RowStore(seed=1).plan())
    rows = RowStore()
    other = {"view": {"recipe": rows.view_recipe.model_dump(mode="json"), "fingerprint": "1"}}
    second = StoreWriter(address, rows.plan(identity=other))
    created = type(second)._create_manifest

    def overtaken(writer, manifest):
        with first:
            return created(writer, manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3.BucketLocation, "held", lambda *_: [])
        second._create_manifest = lambda manifest: overtaken(second, manifest)
        with pytest.raises(StoreMismatch), second:
            pass
    assert load_manifest(address).view_fingerprint == "0"


@integration
@pytest.mark.parametrize("fault", ["refused", "lost"])
def test_errors_of_the_server_lose_nothing(address, tmp_path, server, fast, fault):
    rows = RowStore(views=2)
    server.fail(fault, key="manifest.json", times=3)
    server.fail(fault, key="/c.", times=3)
    server.fail("refused", key="views/", method="GET", times=2)
    write_rows(address, rows)
    assert server.faults == [("refused", "GET", "views/")] * len(server.faults)
    write_rows(tmp_path / "s.zarr", rows)
    assert objects(address) == local_objects(tmp_path / "s.zarr")


@integration
def test_a_response_that_never_comes_loses_nothing(address, tmp_path, server, fast, monkeypatch):
    monkeypatch.setattr(s3, "TIMEOUT", s3.timedelta(seconds=1))
    rows = RowStore(views=1)
    for key in ("manifest.json", "/c."):
        server.fail("slow", key=key)
    write_rows(address, rows)
    assert not server.faults
    write_rows(tmp_path / "s.zarr", rows)
    assert objects(address) == local_objects(tmp_path / "s.zarr")


@integration
def test_a_content_that_is_cut_is_not_served(address, server, fast):
    rows = write_rows(address, RowStore(views=1))
    reader = StoreReader(address)
    server.fail("cut", method="GET", key="/c.")
    try:
        found = reader.components("logits", 0, np.arange(50))["values"]
    except (OSError, StoreDamaged):
        found = reader.components("logits", 0, np.arange(50))["values"]
    assert not server.faults
    assert np.array_equal(found, rows.stored("logits", 0))


@integration
@pytest.mark.parametrize("home", ["s3", "gs"], indirect=True)  # requests to Azure sign their conditions
def test_a_server_that_ignores_conditions_is_refused_or_has_one_writer(address, tmp_path, server):
    server.keeps_conditions = False
    rows = RowStore(views=2)
    with pytest.raises(RecipeError, match=r"does not keep conditional writes.*--single-writer"):
        write_rows(address, rows)
    assert objects(address) == {}
    with pytest.raises(RecipeError, match="part 0/2 is not the only one"):
        write_part(address, rows, Part(0, 2), single_writer=True)
    write_part(address, rows, None, single_writer=True)
    write_rows(tmp_path / "s.zarr", rows)
    assert objects(address) == local_objects(tmp_path / "s.zarr")


@integration
def test_two_of_one_part_do_not_write_at_the_same_time(address, monkeypatch):
    with owning(address, Part(0, 2)):
        with pytest.raises(StoreBusy, match=f"process {os.getpid()} on .* is writing part 0/2"):
            write_rows(address)
        with owning(address, Part(1, 2)):
            assert len(live_runs(address)) == 2
        assert len(live_runs(address)) == 1
        monkeypatch.setattr(s3, "LEASE_SECONDS", -1.0)
        assert live_runs(address) == []
    monkeypatch.undo()
    with owning(address, Part()):
        monkeypatch.setattr(s3.psutil, "pid_exists", lambda _: False)
        assert live_runs(address) == []


@integration
def test_a_lease_is_renewed(address, monkeypatch):
    monkeypatch.setattr(s3, "RENEW_SECONDS", 0.05)
    location = open_location(address)
    with location.hold("runs/a.json", b"1"):
        first = location.modified("runs/a.json")
        for _ in range(200):
            if location.modified("runs/a.json") > first:
                break
            threading.Event().wait(0.05)
        assert location.modified("runs/a.json") > first
        assert location.held("runs") == [("runs/a.json", b"1")]


@integration
def test_a_fork_is_refused_instead_of_hanging(address, monkeypatch):
    location = open_location(address)
    location.put("x", b"1")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="start processes by `spawn`"):
        location.get("x", 1)


@integration
def test_damage_is_found(address):
    write_rows(address, RowStore(views=1))
    location = open_location(address)
    key = next(key for key in objects(address) if key.startswith("logits/values/c."))
    location.put(key, location.get(key, 1 << 20)[:-1] + b"x")
    assert [problem.key for problem in verify(address).problems] == [key]
    with pytest.raises(
        StoreDamaged, match=rf"{address}/{key}. does not match its checksum.*--store {address}"
    ):
        StoreReader(address).components("logits", 0, np.arange(2))


@integration
def test_a_bucket_that_is_not_there_is_named(home):
    scheme = home.partition(":")[0]
    word, variable = {
        "s3": ("bucket", "AWS_ENDPOINT_URL"),
        "gs": ("bucket", "GOOGLE_BASE_URL"),
        "az": ("container", "AZURE_STORAGE_ENDPOINT"),
    }[scheme]
    address = f"{scheme}://nowhere/s.zarr"
    with pytest.raises(
        StoreNotFound, match=rf"there is no {word} 'nowhere' for the store '{address}'.*{variable}"
    ):
        write_rows(address)
    with pytest.raises(StoreNotFound, match=f"there is no store at '{address}'"):
        StoreReader(address)
    with pytest.raises(FileNotFoundError, match=f"There is no such {word}"):
        open_location(address).names("views")


@integration
def test_credentials_that_are_refused_or_missing_are_named_by_their_variables(container, fast, monkeypatch):
    names = "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"

    def refused():
        result = CliRunner().invoke(precompute, ["status", "--store", f"az://{container}/s.zarr"])
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        return result.stderr

    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"another").decode())
    printed = refused()
    assert ": The server refuses the credentials: " in printed
    assert "403 Forbidden: AuthorizationFailure: Server failed to authenticate the request." in printed
    assert printed.endswith(f" (set by {names})\n")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64!")
    assert refused().endswith(f". Check {names}\n")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    assert refused().endswith(f"Account must be specified. Check {names}\n")


@integration
@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        ("s3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gs", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
def test_where_there_are_no_credentials_their_variables_are_named(scheme, names):
    """The library requests those of the cloud's instance. How that fails depends on the machine."""
    from obstore.exceptions import GenericError

    error = GenericError("Error performing token request: GET http://169.254.169.254/token - no route")
    found = SERVICES[scheme].system_error(error, "where")
    assert isinstance(found, PermissionError)
    assert found.strerror.startswith(f"There are no credentials: set {names}. ")


@integration
def test_commands_take_addresses(home, teachers, cnn_store, tmp_path):
    address = f"{home}/cnn.zarr"
    flags = ("--source=digits", "--view=digits", "--views=2", "--block-rows=500")
    result = CliRunner().invoke(
        precompute, ["run", f"--teacher=run:{teachers[1]}", *flags, "--store", address]
    )
    assert result.exit_code == 0, result.output
    assert objects(address) == local_objects(cnn_store)
    for words, line in (
        (["status", "--store", address], f"{address}"),
        (["verify", "--store", address, "--deep", "10"], f"{address}: sound"),
        (["verify", "--store", address, "--content"], f"{address}: sound"),
        (["inspect", address, str(cnn_store)], f"{address}: digits-cnn"),
        (["run", f"--teacher=run:{teachers[1]}", *flags, "--store", address], "2 of 2"),
        (["plan", f"--teacher=run:{teachers[1]}", *flags, "--store", address], "0 to do"),
    ):
        result = CliRunner().invoke(precompute, words)
        assert result.exit_code == 0, result.output
        assert line in result.stdout
    location = open_location(address)
    key = next(key for key in objects(address) if key.startswith("logits/values/c."))
    location.delete(key)
    result = CliRunner().invoke(precompute, ["verify", "--store", address, "--repair"])
    assert result.exit_code == 0, result.output
    assert objects(address) == local_objects(cnn_store)


@integration
def test_features_and_several_teachers_are_written_alike(home, teachers, tmp_path):
    from coursepack.models import parse_tap
    from coursepack.precompute.several import run_jobs

    for folder in (tmp_path, home):
        jobs = [
            make_job(f"{folder}/{index}.zarr", teacher, taps=taps, block_rows=800)
            for index, (teacher, taps) in enumerate(
                [(teachers[0], ()), (teachers[1], [parse_tap("conv2:attention")])]
            )
        ]
        run_jobs(jobs, quiet=True)
    for index in range(2):
        assert objects(f"{home}/{index}.zarr") == local_objects(tmp_path / f"{index}.zarr")
