"""What every package shares: canonical JSON, configs, whole-file writes, progress, errors as text."""

import math
import os
import signal
import socket
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from pydantic import Field
from terminals import on_terminal

from coursepack import console, files
from coursepack.canonical import canonical_json, difference_table, differences, fingerprint
from coursepack.commands import Commands
from coursepack.config import Config, check_given, parse_config, read_yaml, write_yaml
from coursepack.console import byte_size, print_table, progress
from coursepack.errors import CoursepackError, RecipeError, StoreNotFound, UnknownName
from coursepack.files import naming, open_regular, partials, write_whole

# Canonical JSON


def test_canonical_json_has_one_spelling():
    value = {"b": [1, (2.5, None)], "a": {"x": None, "y": "é"}, "c": True}
    text = '{"a":{"y":"\\u00e9"},"b":[1,[2.5,null]],"c":true}'
    assert canonical_json(value) == text
    assert canonical_json(dict(reversed(value.items()))) == text
    assert canonical_json({3: 0.1}) == '{"3":0.1}'
    assert canonical_json({"a": [1]}, indent=1) == '{\n "a": [\n  1\n ]\n}'
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            canonical_json({"x": [bad]})


def test_fingerprints():
    # sha256 of `{"a":1}`, by sha256sum.
    known = "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert fingerprint({"a": 1, "b": None}) == known
    assert len({fingerprint(value) for value in (1, 1.0, True, "1", [1], {"1": 1}, None)}) == 7


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}, []),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, [("a.b[1]", "2", "3")]),
        ({"a": 1}, {"b": "x"}, [("a", "1", "-"), ("b", "-", "x")]),
        ({"a": [1, 2]}, {"a": [1]}, [("a[1]", "2", "-")]),
        ({"a": {}}, {}, [("a", "{}", "-")]),
        ({"a": {"b": 1}}, {"a": 1}, [("a", '{"b":1}', "1")]),
        (1, 1.0, [("", "1", "1.0")]),
        ({"a": True}, {"a": 1}, [("a", "true", "1")]),
    ],
)
def test_differences(left, right, expected):
    assert differences(left, right) == expected
    assert differences(right, left) == [(path, b, a) for path, a, b in expected]
    assert (fingerprint(left) == fingerprint(right)) == (not expected)


def test_difference_table_is_aligned():
    table = difference_table(
        {"seed": 0, "size": None, "ops": ["crop"]}, {"seed": 10, "ops": ["flip"]}, "store", "run"
    )
    assert table == "  ops[0]   store: crop   run: flip\n  seed     store: 0      run: 10"


# Configs


class Inner(Config):
    padding: int = Field(default=1, ge=1)


class Outer(Config):
    name: str
    inner: Inner = Inner()
    seeds: tuple[int, ...] = ()


def test_configs_show_everything_wrong_at_once():
    values = {"inner": {"pading": 2, "padding": 0}, "sedes": 1, "seeds": 3, "zzz": 1}
    lines = [
        "  name: is missing",
        "  inner.padding: expected at least 1, got 0",
        "  inner.pading: unknown key, did you mean 'padding'?",
        "  seeds: expected a list, got 3",
        "  sedes: unknown key, did you mean 'seeds'?",
        "  zzz: unknown key",
    ]
    with pytest.raises(RecipeError) as caught:
        parse_config(Outer, values, "file.yaml")
    assert str(caught.value) == "\n".join(["file.yaml is not valid:", *lines])
    with pytest.raises(RecipeError) as caught:
        check_given(Outer, values, "file.yaml")
    assert str(caught.value) == "\n".join(["file.yaml is not valid:", *lines[1:]])
    check_given(Outer, {"inner": {}}, "what is missing may still come")
    with pytest.raises(RecipeError, match=r"inner: expected a mapping, got \[1\]"):
        parse_config(Outer, {"name": "x", "inner": [1]}, "file.yaml")
    with pytest.raises(RecipeError, match="is not valid"):
        parse_config(Outer, {"name": "x", "inner": {"padding": math.inf}}, "file.yaml")


def test_configs_cannot_change():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(Outer, {"name": "x"}, "here").name = "y"


def test_yaml_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(write_yaml({"b": 1e-5, "a": ["é", None]}))
    assert path.read_text() == "b: 1.0e-05\na:\n- é\n- null\n"
    assert read_yaml(path) == {"b": 1e-5, "a": ["é", None]}
    path.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(RecipeError, match="is not YAML: could not determine a constructor"):
        read_yaml(path)
    with pytest.raises(RecipeError, match=r"cannot read .*: Is a directory"):
        read_yaml(tmp_path)


# Whole-file writes


def test_write_whole(tmp_path):
    path = tmp_path / "f"
    write_whole(path, b"old")
    with path.open("rb") as held:
        write_whole(path, b"", b"ne", memoryview(bytearray(b"w!")))
        assert held.read() == b"old", "whoever has the old file open or mapped keeps it"
    assert path.read_bytes() == b"new!"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_whole(path, b"new")
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No space left") as error:
        files.flush_folder(tmp_path)
    assert error.value.filename == str(tmp_path)


def test_a_file_that_grows_too_large_is_named(tmp_path):
    """By a limit of the system, which tells no path."""
    path = tmp_path / "f"
    code = (
        "import pathlib, resource, sys\nfrom coursepack.files import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_whole(pathlib.Path(sys.argv[1]), bytes(2000))"
    )
    failed = subprocess.run([sys.executable, "-c", code, path], check=False, capture_output=True, text=True)
    assert failed.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert list(tmp_path.iterdir()) == []


def test_errors_are_given_the_path_that_they_lack(tmp_path):
    with pytest.raises(OSError, match=r"Disk quota exceeded: '.*/f'"), naming(tmp_path / "f"):
        raise OSError(122, "Disk quota exceeded")
    with pytest.raises(FileNotFoundError, match="'other'"), naming(tmp_path / "f"):
        raise FileNotFoundError(2, "No such file or directory", "other")
    with pytest.raises(StoreNotFound, match="no store"), naming(tmp_path / "f"):
        raise StoreNotFound("no store")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_CREAT], ids=["read", "write"])
@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a socket"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, kind, flags):
    path = tmp_path / "it"
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as bound:
        {"a FIFO": lambda: os.mkfifo(path), "a folder": path.mkdir, "a socket": lambda: bound.bind("it")}[
            kind
        ]()
        with pytest.raises(OSError, match=f"It is {kind}, expected a regular file|Is a directory") as error:
            open_regular(path, flags)
    assert error.value.filename == str(path)


def test_a_regular_file_is_opened(tmp_path):
    for flags, mode in ((os.O_WRONLY | os.O_CREAT, "w"), (os.O_RDONLY, "r")):
        with os.fdopen(open_regular(tmp_path / "f", flags), mode) as file:
            assert mode == "r" or file.write("abc") == 3
    assert (tmp_path / "f").read_text() == "abc"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_killed_write_leaves_a_partial_file_only(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    code = (
        "import os, pathlib, signal, sys\nfrom coursepack.files import write_whole\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(pathlib.Path(sys.argv[1]), b'new')"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = partials(tmp_path)
    assert left.name.startswith("f.")
    assert {left, path} == set(tmp_path.iterdir())
    assert list(partials(tmp_path / "none")) == []


def test_partial_names_tell_processes_and_hosts_apart(tmp_path, monkeypatch):
    names = set()

    def note(descriptor):
        names.update(partial.name for partial in partials(tmp_path))

    monkeypatch.setattr(files.os, "fsync", note)
    for host in ("one", "two", "two", "odd/../höst" * 40):
        monkeypatch.setattr(files.platform, "node", lambda host=host: host)
        write_whole(tmp_path / "f", b"new")
    assert len(names) == 4
    assert sum(".two." in name for name in names) == 2
    assert all(f".{os.getpid()}." in name and len(name) < 100 for name in names)


# Progress and tables


def test_progress_in_a_log_is_plain_lines(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 11.0, 11.0, 12.0, 22.0, 22.0, 23.0, 23.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with progress("train", 10_000, "samples", done=2000) as meter:
        meter.advance(100)
        meter.advance(1000, "accuracy 90 %")
        meter.advance(50)
        meter.advance(1050)
        meter.advance(5800)
    assert capsys.readouterr() == (
        "",
        "train: 3,100 of 10,000 samples, 100 samples/s, 69 s left, accuracy 90 %\n"
        "train: 4,200 of 10,000 samples, 100 samples/s, 58 s left\n"
        "train: 10,000 of 10,000 samples, 348 samples/s, 0 s left\n",
    )


def test_progress_in_a_log_has_no_pace_before_the_second_step_and_no_line_twice(monkeypatch, capsys):
    clock = iter([0.0, 25.0, 25.0, 36.0, 36.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with progress("precompute", 1000, "images") as meter:
        meter.advance(256, "view 1 of 8")
        meter.advance(744, "view 8 of 8")
    assert capsys.readouterr() == (
        "",
        "precompute: 256 of 1,000 images, view 1 of 8\n"
        "precompute: 1,000 of 1,000 images, 28 images/s, 0 s left, view 8 of 8\n",
    )


def test_progress_over_nothing_says_nothing(capsys):
    with progress("train", 10, "samples", done=10):
        pass
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    def train():
        with progress("train", 40, "samples") as meter:
            meter.advance(40, "accuracy 90 %")

    text = on_terminal(monkeypatch, 120, train, "stderr")
    for part in ("train", "━", "40/40", "samples/s", "0:00:00", "accuracy 90 %"):
        assert part in text


def test_a_task_shows_progress_after_its_delay(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 3.0, 3.0, 4.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with progress("scan", 10, "files", delay=2.0) as meter:
        meter.advance(1)
        meter.advance(1)
    assert capsys.readouterr() == ("", "scan: 2 of 10 files, 30 files/min, 16 s left\n")


def test_a_short_task_shows_no_progress(capsys):
    with progress("scan", 10, "files", delay=60.0) as meter:
        meter.advance(10)
    assert capsys.readouterr() == ("", "")


def test_progress_within_progress_is_a_second_bar(monkeypatch):
    def sweep():
        with progress("sweep", 2, "students") as outer:
            for name in ("one", "two"):
                with progress(f"train {name}", 5, "samples") as meter:
                    meter.advance(5)
                outer.advance(1)

    text = on_terminal(monkeypatch, 120, sweep, "stderr")
    for part in ("sweep", "train one", "train two", "5/5", "2/2"):
        assert part in text


def test_tables_are_not_cut_and_read_no_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_table("[red]Title", ["recipe", "n"], [["[bold]" + "long " * 30, "1"], ["b", "20"]])
    out, err = capsys.readouterr()
    assert "[red]Title" in out
    assert "[bold]" + "long " * 30 in out
    assert "│ 20 │" in out
    assert err == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (2_500_000, "2.5 MB"),
        (3e9, "3.0 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_byte_size(count, text):
    assert byte_size(count) == text


# Errors


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StoreNotFound("there is no store at 'a'"), "Error: there is no store at 'a'\n"),
        (PermissionError(13, "Permission denied", "a/b"), "Error: Permission denied: a/b\n"),
        (OSError("something"), "Error: something\n"),
        (UnknownName("view", "digit", ["none", "digits"]),
         "Error: unknown view 'digit'. Did you mean 'digits'? Known: none, digits.\n"),
        (UnknownName("view", "zzz", ["none"]), "Error: unknown view 'zzz'. Known: none.\n"),
        (UnknownName("view", "z" * 9999, ["none"]),
         f"Error: unknown view '{'z' * 199}.... Known: none.\n"),
    ],
)  # fmt: skip
def test_commands_turn_errors_into_text(error, text):
    @click.group(cls=Commands)
    def group():
        pass

    @group.command()
    def fail():
        raise error

    result = CliRunner().invoke(group, ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", text)


def test_bugs_are_not_turned_into_text():
    @click.group(cls=Commands)
    def group():
        pass

    @group.command()
    def fail():
        raise ZeroDivisionError

    assert isinstance(CliRunner().invoke(group, ["fail"]).exception, ZeroDivisionError)


def test_every_error_is_a_builtin_one_too():
    kinds = CoursepackError.__subclasses__()
    assert len(kinds) >= 10
    for kind in kinds:
        builtin = [base for base in kind.__mro__ if base.__module__ == "builtins"]
        assert builtin[0] is not Exception, kind
