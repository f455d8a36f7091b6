"""docs/extending.md: its examples are applied to a copy of the sources, counted, and run there."""

from __future__ import annotations

import ast
import configparser
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import STUDENT
from click.testing import CliRunner

import coursepack
from coursepack.distill.cli import main as distill

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
LEFT_OUT = shutil.ignore_patterns(
    ".venv", ".git", "build", "dist", "demo", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"
)
FILE = re.compile(
    r"^`([^`]+)` \((?:(new|line)|row of `(\w+)`|written by `([^`]+)`)\)\n(?:\n```\w+\n(.*?)^```\n)?",
    re.M | re.S,
)
"""A file of an example: its path, what is done to it, and the text that is added."""
CODE = ("common", "kernels", "data", "models", "pages", "precompute", "distill")


@dataclass(frozen=True)
class Addition:
    """What an example does to one file."""

    path: str
    kind: str
    """`new`, `line`, or empty for a row of a table or a file that a command writes."""
    table: str
    command: str
    text: str


@dataclass(frozen=True)
class Example:
    """One section of the page."""

    title: str
    additions: tuple[Addition, ...]
    commands: tuple[str, ...]
    contract: str
    files_of_code: int
    files_beside: int

    @property
    def names(self):
        """Names by which its tests are found: of its own files of tests, and of the rows of contracts."""
        rows = [re.findall(r'^\+    "(\w+)"', each.text, re.M) for each in self.additions]
        ops = re.findall(r"op: Literal\[.(\w+)", self.additions[0].text)
        return {name for found in rows for name in found} | set(ops)


def examples():
    """The sections of the page that the table on top lists."""
    rows = re.findall(r"^\| \[.*?\]\(#([\w-]+)\) \|.*\| `(tests/\w+.py)` \| (\d) \| (\d) \|$", PAGE, re.M)
    sections = {text.splitlines()[0].lower().replace(" ", "-"): text for text in PAGE.split("\n## ")[1:]}
    for title, contract, code, beside in rows:
        additions = tuple(Addition(*found) for found in FILE.findall(sections[title]))
        commands = re.findall(r"^    ((?:distill|precompute) .*)$", sections[title], re.M)
        yield Example(title, additions, tuple(commands), contract, int(code), int(beside))


EXAMPLES = list(examples())
EACH = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)


def with_row(text, table, added):
    """A module with imports, functions and a row added: the row at the end of the table."""
    lines = [line.removeprefix("+") for line in added.splitlines()]
    before, row = (
        (lines[: lines.index("...")], lines[lines.index("...") + 1 :]) if "..." in lines else ([], lines)
    )
    imports = [line for line in before if line.startswith(("from ", "import "))]
    functions = [line for line in before if line not in imports]
    held = text.splitlines()
    body = ast.parse(text).body
    found = [each for each in body if isinstance(each, ast.Assign | ast.AnnAssign) and table in targets(each)]
    assert len(found) == 1, f"there is no table {table}"
    start, end = found[0].lineno - 1, found[0].end_lineno - 1
    last = max(each.end_lineno for each in body if isinstance(each, ast.Import | ast.ImportFrom))
    above = [*held[:last], *imports, *held[last:start], *functions, *held[start:end]]
    if start == end:
        closing = held[end][-1]
        row, end = [held[end][:-1] + ",", *row, closing], end + 1
    return "\n".join([*above, *row, *held[end:], ""])


def targets(assignment):
    """Names that an assignment assigns."""
    found = assignment.targets if isinstance(assignment, ast.Assign) else [assignment.target]
    return {each.id for each in found if isinstance(each, ast.Name)}


def apply(example, tree):
    """Do what an example says."""
    for each in example.additions:
        path = tree / each.path
        if each.kind == "new":
            assert not path.exists()
            path.write_text(each.text)
        elif each.kind == "line":
            path.write_text(path.read_text() + "".join(line[1:] for line in each.text.splitlines(True)))
        elif each.table:
            path.write_text(with_row(path.read_text(), each.table, each.text))


def run(command, tree):
    """Run a command of the page in a copy of the sources, on the copy's own packages."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(tree.parent / "packages"), str(tree / "tests"))),
    }
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def linked(tree):
    """Make the copy's packages importable, with what Python and numba compiled from the same sources."""
    setup = configparser.ConfigParser()
    setup.read(tree / "setup.cfg")
    folders = dict(line.split(" = ") for line in setup["options"]["package_dir"].split("\n") if line)
    installed = Path(coursepack.__file__).parents[1]
    for package, folder in folders.items():
        target = tree.parent / "packages" / package.replace(".", "/")
        target.mkdir(parents=True)
        for path in (tree / folder).iterdir():
            if path.is_file():
                (target / path.name).symlink_to(path)
        compiled = installed / package.replace(".", "/") / "__pycache__"
        (target / "__pycache__").mkdir()
        for path in (*compiled.glob("*.nb?"), *compiled.glob("*.pyc")):
            shutil.copy2(path, target / "__pycache__")
    return tree


def contents(tree):
    """Every file of a folder."""
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the sources to which all examples are applied, and the files that each of them changed."""
    tree = shutil.copytree(ROOT, tmp_path_factory.mktemp("extended") / "tree", ignore=LEFT_OUT)
    changed, before = {}, contents(tree)
    for example in EXAMPLES:
        apply(example, tree)
        after = contents(tree)
        changed[example.title] = {path for path, text in after.items() if before.get(path) != text}
        before = after
    return tree, changed


@pytest.fixture(scope="module")
def extended(copy):
    """The copy with sorted imports, importable."""
    tree, changed = copy
    paths = " ".join(sorted(path for path in set().union(*changed.values()) if path.endswith(".py")))
    run(f"python -m ruff check --quiet --fix {paths}", tree)
    run(f"python -m ruff format --quiet {paths}", tree)
    return linked(tree)


ONCE = """
import runpy, sys
import pytest
from coursepack.distill.cli import main as distill
from coursepack.precompute.cli import main as precompute

written, commands, tests = {!r}, {!r}, {!r}
for path, *words in written:
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")
for name, *words in commands:
    {{"distill": distill, "precompute": precompute}}[name].main(words, standalone_mode=False)
sys.exit(pytest.main(tests))
"""
"""All that runs in the copy, in one process: importing it is what takes longest."""


@pytest.fixture(scope="module")
def outcomes(extended):
    """Outcome of every test of the examples and of their contracts, by file and name.

    Before them, the commands of the page are run, and those that write files.
    """
    own = [each.path for example in EXAMPLES for each in example.additions if "/test_" in each.path]
    files = sorted({*own, *(example.contract for example in EXAMPLES), "tests/test_house.py"})
    names = {name for example in EXAMPLES for name in example.names}
    names |= {Path(path).stem for path in own if not (ROOT / path).exists()} | {
        "every_executor",
        "golden",
        "imports_go_down",
        "rooms_of",
    }
    # zarr brings a plugin for pytest, and is imported before pytest starts.
    chosen = ["-q", "-k", " or ".join(sorted(names)), "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    chosen += ["--junitxml=out.xml", "-p", "no:cacheprovider", *files]
    written = [
        shlex.split(each.command)[1:] for example in EXAMPLES for each in example.additions if each.command
    ]
    lines = [shlex.split(line) for example in EXAMPLES for line in example.commands]
    assert len(lines) > 4
    (extended / "once.py").write_text(ONCE.format(written, lines, chosen))
    status, output = run("python once.py", extended)
    assert status == 0, output
    cases = ET.parse(extended / "out.xml").getroot().iter("testcase")
    return {f"{case.get('classname')} {case.get('name')}": list(case) == [] for case in cases}


@EACH
def test_files_are_as_many_as_the_table_says(example, copy):
    touched = copy[1][example.title] | {each.path for each in example.additions if each.command}
    assert touched == {each.path for each in example.additions}
    code = {path for path in touched if path.split("/")[0] in CODE}
    assert (len(code), len(touched - code)) == (example.files_of_code, example.files_beside)
    assert len([each for each in example.additions if each.kind == "new" and each.path in code]) == 1


@pytest.mark.integration
@EACH
def test_contract_and_own_tests_pass(example, outcomes):
    stem = Path(example.contract).stem
    contract = [
        name for name in outcomes if stem in name and any(each in name for each in {*example.names, "every"})
    ]
    assert contract, f"{example.contract} has no test of {example.names}"
    for each in example.additions:
        if each.kind == "new" and each.path.startswith("tests/"):
            assert [name for name in outcomes if Path(each.path).stem in name]
    assert all(outcomes.values())


def test_examples_are_as_the_linters_want_them(extended):
    status, output = run(f"python -m ruff check {' '.join(CODE)} tests", extended)
    assert status == 0, output
    new = [each for example in EXAMPLES for each in example.additions if each.kind == "new"]
    assert {each.path for each in new if (extended / each.path).read_text() != each.text} == set()


def test_sections_are_complete():
    assert [example.title for example in EXAMPLES if not example.additions or not example.names] == []
    assert len(EXAMPLES) > 4


def test_a_recipe_visits_the_files_in_this_order(stores, tmp_path):
    stated = re.findall(r"^\d\. `([^`]+)`", PAGE, re.M)
    for name in stated:  # an import calls functions of its own
        importlib.import_module(f"coursepack.{name.removesuffix('.py').replace('/', '.')}")
    package = str(Path(coursepack.__file__).parent)
    visited = []

    def note(frame, event, _argument):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(package) and frame.f_code.co_name != "<module>":
            name = path[len(package) + 1 :]
            if name not in visited:
                visited.append(name)

    options = ["--student", STUDENT, "--store", str(stores[0]), "--limit", "64", "--epochs", "1"]
    sys.setprofile(note)
    try:
        result = CliRunner().invoke(distill, ["train", *options, "--out", str(tmp_path / "run")])
    finally:
        sys.setprofile(None)
    assert result.exit_code == 0, result.output
    assert [name for name in visited if name in stated] == stated
    section = PAGE.partition("## How a recipe")[2].partition("\n## ")[0]
    assert all((ROOT / name).is_file() for name in re.findall(r"`(\S+\.py)`", section))
