"""Texts made to harm: refused with one sentence, quickly, before anything is built of them."""

import os
import time

import pytest

from coursepack.config import read_yaml
from coursepack.errors import RecipeError, RunError
from coursepack.parsing import parse_json, parse_yaml, read_json

BOMB = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)

BAD_JSON = [
    ('{"a": 1, "a": 2}', "gives the key 'a' twice"),
    ('[{"b": {"seed": 1, "x": 2, "seed": 1}}]', "gives the key 'seed' twice"),
    (b'{"a": "\xe9"}', "is not JSON: it is not text (byte 7 is not UTF-8)"),
    ("[" * 65 + "]" * 65, "is nested more than 64 levels deep"),
    ("[" * 100_000, "is nested more than 64 levels deep"),
    ('{"a":' * 100_000, "is nested more than 64 levels deep"),
    ("[NaN]", "holds NaN, which JSON cannot represent"),
    ("[-Infinity]", "holds -Infinity"),
    ("1e999", "holds the number 1e999, which is too large"),
    ("1" * 5000, "holds a whole number of 5,000 digits, expected at most 40"),
    ('{"a": 1', "is not JSON: Expecting ',' delimiter (line 1, column 8)"),
    ("", "is not JSON: Expecting value (line 1, column 1)"),
]
BAD_YAML = [
    ("lr: 1\nlr: 2", "gives the key 'lr' twice"),
    ("a: [{b: 1, c: 2, b: 3}]", "gives the key 'b' twice"),
    ('{1: a, "1": b}', "gives the key '1' twice"),
    ("{1: a, true: b}", "gives the key True twice"),
    ("a: &x {c: 1}\nb: {<<: *x, <<: *x}", "gives the key '<<' twice"),
    (b"a: \xe9", "is not YAML: it is not text (byte 3 is not UTF-8)"),
    ("a: \udce9", "is not YAML: it is not text (it holds '\\udce9')"),
    ("[" * 65 + "]" * 65, "is nested more than 64 levels deep"),
    ("[" * 1_000_000, "is nested more than 64 levels deep"),
    ("- " * 100_000, "is nested more than 64 levels deep"),
    ("- &a0 1\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 99)), "is nested more than 64 levels"),
    (BOMB, "repeats more than 10,000 values by aliases"),
    (BOMB.replace("[1, 2, 3,", "{k: [1, 2, 3],").replace("9]", "9: 1}"), "repeats more than 10,000 values"),
    ("&a [*a]", "repeats '*a' within itself"),
    ("[*a]", "is not YAML: found undefined alias"),
    ("- 1\n" * 200_000, "holds more than 100,000 values"),
    ("# " + "x" * 1_048_576, "is longer than 1,048,576 bytes"),
    ("1" * 41, "holds a number of 41 characters, expected at most 40"),
    ("0x" + "f" * 5000, "holds a number of 5,002 characters"),
    ("!!int abc", "holds 'abc' as a number"),
    ("!!bool maybe", "holds 'maybe' as a boolean"),
    ('"a\\0b"', "holds the character '\\x00'"),
    ("!!binary aGk=", "is not YAML: could not determine a constructor"),
    ("!!map [1]", "is not YAML: expected a mapping node"),
    ("? [a]\n: 1", "is not YAML: while constructing a mapping"),
]


@pytest.mark.parametrize(("text", "fault"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json(text, fault):
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert str(caught.value).startswith(fault)


@pytest.mark.parametrize(("text", "fault"), BAD_YAML, ids=range(len(BAD_YAML)))
def test_bad_yaml(text, fault):
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(fault)
    assert time.process_time() - began < 5


def test_what_is_taken():
    assert parse_json(b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}') == {"a": [1, 2.5, None, True, "é"]}
    assert parse_json('{"a": {"b": 1}, "b": {"b": 2}}') == {"a": {"b": 1}, "b": {"b": 2}}
    assert parse_json("[" * 64 + "]" * 64) == parse_yaml("[" * 64 + "]" * 64)
    assert parse_yaml("{a: 1, b: [2.5, null, true, é], c: 2026-01-31}") == {
        "a": 1,
        "b": [2.5, None, True, "é"],
        "c": "2026-01-31",
    }
    merged = "a: &x {lr: 1, n: [1]}\nb: *x\nc: {<<: *x, lr: 2}"
    assert parse_yaml(merged)["c"] == {"lr": 2, "n": [1]}
    assert parse_yaml("") is None


def test_files_name_themselves_and_the_fault(tmp_path):
    path = tmp_path / "a.file"
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(RunError, match=r"^'.*a\.file' gives the key 'a' twice$"):
        read_json(path, RunError)
    with pytest.raises(RecipeError, match=r"^'.*a\.file' gives the key 'a' twice$"):
        read_yaml(path)
    path.write_text("[" + "1, " * 1000 + "1]")
    assert read_json(path, RunError, max_bytes=5000) == [1] * 1001
    with pytest.raises(RunError, match=r"a\.file' has 3,003 bytes, expected at most 3,000$"):
        read_json(path, RunError, max_bytes=3000)
    with pytest.raises(RunError, match=r"^cannot read '.*none': No such file or directory$"):
        read_json(tmp_path / "none", RunError)
    with pytest.raises(RunError, match="Is a directory"):
        read_json(tmp_path, RunError)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RecipeError, match=r"fifo' is not a regular file$"):
        read_yaml(tmp_path / "fifo")
