"""A full disk and a read-only folder: said in one sentence, nothing torn, and the run goes on afterwards."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import file_identities, make_job, store_files

from coursepack import files as files_module
from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.precompute import run_job
from coursepack.precompute.cli import main

CAPABILITY_VERSION_3 = 0x20080522
OPTIONS = {"views": 2, "encoding": "float32", "block_rows": 300, "batch_size": 100}


@pytest.fixture(scope="module")
def once(tmp_path_factory, teacher):
    """The files of a store that was written in one go."""
    path = tmp_path_factory.mktemp("once") / "s.zarr"
    run_job(make_job(path, teacher, **OPTIONS))
    return store_files(path)


@pytest.fixture
def command(teacher):
    """Run `precompute run` in this process."""
    flags = [f"--teacher=run:{teacher}", "--source=digits", "--view=digits", "--device=cpu", "--ignore-space"]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    return lambda path: CliRunner().invoke(main, ["run", *flags, f"--store={path}"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def assert_refused(result, text):
    assert result.exit_code == 1, result.output
    assert text in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def assert_nothing_is_torn(path):
    assert not list(path.rglob("*.partial"))
    assert verify(path).problems == ()


@pytest.mark.parametrize("writes", [0, 3, 9, 13, 16, 17, 18, 19, 21, 24, 26, 30])
def test_a_disk_that_fills_at_any_write(tmp_path, command, once, monkeypatch, writes):
    """The disk fills in the middle of the given write of a file; later it has room again."""
    path, count = tmp_path / "s.zarr", 0

    class FullFile:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def fileno(self):
            return self._file.fileno()

        def write(self, data):
            nonlocal count
            count += 1
            if count > writes:
                self._file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data)

    class FullPath(type(Path())):
        def open(self, *arguments, **options):
            return FullFile(super().open(*arguments, **options))

    with monkeypatch.context() as patch:
        for name in ("write_whole", "create_whole"):
            whole = getattr(files_module, name)
            patch.setattr(
                f"coursepack.data.store.locations.local.{name}",
                lambda path, *pieces, whole=whole: whole(FullPath(path), *pieces),
            )
        assert_refused(command(path), f"No space left on device: {path}/")
    assert count > writes
    kept = file_identities(path)
    if (path / "manifest.json").is_file():
        assert_nothing_is_torn(path)
    assert command(path).exit_code == 0
    assert store_files(path) == once
    done = [place for place in kept if kept[place] == file_identities(path)[place]]
    assert len(done) >= len([place for place in kept if place.startswith("logits/")]) - 1


def test_a_disk_that_is_really_full(small_disk, command, once, monkeypatch):
    path = small_disk / "s.zarr"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (270 << 10))
    assert_refused(command(path), f"No space left on device: {path}/logits/values/c.")
    assert_nothing_is_torn(path)
    assert 0 < len(list((path / "logits/values").glob("c.*"))) < 10
    kept = file_identities(path)
    filler.unlink()
    result = command(path)
    assert result.exit_code == 0, result.output
    assert store_files(path) == once
    assert kept.items() <= file_identities(path).items()


def test_a_folder_that_cannot_be_written(small_disk, command, once):
    remount = ["mount", "-o", "remount,ro", small_disk]
    subprocess.run(remount, check=True, capture_output=True)
    assert_refused(command(small_disk / "s.zarr"), "Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw,size=4m", small_disk], check=True, capture_output=True)
    assert list(small_disk.iterdir()) == []
    assert command(small_disk / "s.zarr").exit_code == 0
    before = store_files(small_disk / "s.zarr")
    subprocess.run(remount, check=True, capture_output=True)
    # A store that is only read needs nothing to be written.
    reader = StoreReader(small_disk / "s.zarr")
    assert reader.views == (0, 1)
    assert verify(small_disk / "s.zarr").problems == ()
    assert_refused(command(small_disk / "s.zarr"), "Read-only file system")
    assert store_files(small_disk / "s.zarr") == before == once
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True, capture_output=True)


@contextmanager
def plain_user():
    """This thread, and those it starts, without the capabilities by which root writes everywhere."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable ones, twice 32 bits
    assert libc.capget(header, held) == 0
    without = type(held)(0, held[1], held[2], 0, held[4], held[5])
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


def test_a_folder_without_permission(tmp_path, command):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    with plain_user():
        assert_refused(command(folder / "s.zarr"), "Permission denied")
    folder.chmod(0o755)
    assert command(folder / "s.zarr").exit_code == 0
    assert load_manifest(folder / "s.zarr").committed_views() == (0, 1)
    shutil.rmtree(folder)
