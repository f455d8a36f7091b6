"""Mutations of valid files, and a guard: what a command may do with them, however they are made."""

from __future__ import annotations

import copy
import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from coursepack.errors import CoursepackError

MAX_BYTES = 200 << 20
"""Of memory that a case may take."""
MAX_SECONDS = 120
MAX_TEXT = 8000
"""Characters of an error's text."""
LIBRARIES = (sys.prefix, sys.base_prefix, str(Path(np.__file__).resolve().parents[1]))
SYSTEM = ("/proc/", "/sys/", "/dev/", str(Path(__file__).resolve().parents[1]), *LIBRARIES)
"""The system, and modules that are imported late or read data of their own."""

ODD = [None, True, False, 0, 1, -1, 2, 3, 5, 50, 1 << 31, 1 << 40, 1 << 63, 10**30, 10**60, 0.5, -0.0, 1e308]
ODD += [
    "",
    "x",
    "b/c",
    "../x",
    "a\0b",
    "/etc/passwd",
    "python:evil:make",
    "digits",
    "kd",
    "float32",
    "1",
    "\x1b[2J",
]
ODD += ["\ud800", "é" * 300, "x" * 70_000, [], [0], [[]], ["a"], [1 << 40], [None], {}, {"": 0}]
ODD += [{"name": "float32"}, {"op": "pad_crop"}, [{}], [[[[[[[[[[]]]]]]]]]]]
KEYS = ["../x", "/x", "a\0", "", "x", "5", "-1", "name", "logits", "labels", "features/c", "seed", "é"]
PIECES = [
    b"\xff",
    b"\0",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\n",
    b" ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!int ",
]
PIECES += [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 60,
    b"0x" + b"f" * 99,
    b"'",
    b"|",
    b"%",
    b"<<: *a",
    b"\r",
    b"\x85",
]
PIECES += [b"[" * 3000, b'{"a":' * 3000, b"- " * 3000, b'{"a": 1, "a": 2}', b"a: 1\na: 2\n", b"\xef\xbb\xbf"]
PIECES += [b"z: &z [" + b"1," * 99 + b"1]\ny: &y [" + b"*z," * 99 + b"*z]\nx: [" + b"*y," * 99 + b"*y]\n"]

_watched: list[tuple[str, ...] | None] = [None]
_opened: list[str] = []


def _hook(event, arguments):
    if _watched[0] is None:
        return
    if event == "open" and not isinstance(arguments[0], int):
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100  # a hook has to be cheap
        if not path.startswith(_watched[0]):
            _opened.append(f"open {path}")
    elif event in ("subprocess.Popen", "os.system", "socket.connect", "os.exec", "os.fork"):
        _opened.append(event)


sys.addaudithook(_hook)


@contextmanager
def guarded(*folders: Path):
    """Allow files of some folders, `MAX_BYTES` more memory, `MAX_SECONDS`, and errors on purpose."""

    def late(*_):
        raise TimeoutError(f"more than {MAX_SECONDS} seconds")

    used = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData")
    )
    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    signal.alarm(MAX_SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_BYTES, hard))
    too_long = False
    _opened.clear()
    _watched[0] = (*map(str, folders), *SYSTEM)
    try:
        yield
    except CoursepackError as error:
        too_long = len(str(error)) > MAX_TEXT
    except OSError as error:
        # What commands print as a sentence and the file's name.
        if error.filename is None or isinstance(error, TimeoutError):
            raise
    finally:
        _watched[0] = None
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not _opened, _opened
    assert not too_long


def places(tree, path=()):
    """Every place of a tree of mappings and lists, but for the whole."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree, path):
    """What stands at a place of a tree."""
    for step in path:
        tree = tree[step]
    return tree


def mutated_tree(draw, values, odd=ODD):
    """A tree with some of its values set, removed, renamed, changed a little, or copied from elsewhere."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(values))
        if not found:
            break
        path = draw(st.sampled_from(found))
        parent, key = at(values, path[:-1]), path[-1]
        old = parent[key]
        what = draw(st.sampled_from(["set", "set", "remove", "rename", "nudge", "copy", "wrap"]))
        if what == "set":
            parent[key] = copy.deepcopy(draw(st.sampled_from(odd)))
        elif what == "remove":
            del parent[key]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(KEYS))] = parent.pop(key)
        elif what == "nudge" and type(old) in (int, float):
            parent[key] = old + draw(st.sampled_from([-1, 1, 16, -16, old]))
        elif what == "copy":
            parent[key] = copy.deepcopy(at(values, draw(st.sampled_from(found)))) if path else old
        elif what == "wrap":
            parent[key] = [old] if draw(st.booleans()) else {"x": old}
    return values


def mutated_bytes(draw, text):
    """Bytes with some of them changed, removed, inserted, repeated, or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(text) - 1)))
        stop = min(len(text), start + draw(st.integers(1, 40)))
        what = draw(st.sampled_from(["flip", "cut", "insert", "insert", "remove", "repeat", "grow"]))
        if what == "flip":
            flipped = bytes(byte ^ draw(st.integers(1, 255)) for byte in text[start : start + 1])
            text = text[:start] + flipped + text[start + 1 :]
        elif what == "cut":
            text = text[:start]
        elif what == "insert":
            text = text[:start] + draw(st.sampled_from(PIECES)) + text[start:]
        elif what == "remove":
            text = text[:start] + text[stop:]
        elif what == "repeat":
            text = text[:stop] + text[start:stop] + text[stop:]
        else:
            text = text[:stop] + text[start:stop] * draw(st.sampled_from([100, 5000])) + text[stop:]
    return text


def mutated_file(draw, values, dump):
    """The bytes of a file: its values changed, or its bytes, or both."""
    what = draw(st.sampled_from(["tree", "tree", "bytes", "both", "whole"]))
    if what == "whole":
        values = draw(st.sampled_from(ODD))
    elif what != "bytes":
        values = mutated_tree(draw, values)
    text = dump(values)
    return mutated_bytes(draw, text) if what in ("bytes", "both") else text
