"""The house: which package may import which, how long files get, and that none is forgotten."""

import ast
import configparser
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
FOLDERS = dict(line.split(" = ") for line in SETUP["options"]["package_dir"].split("\n") if line)
"""Package to folder."""
COMMON = {
    f"coursepack.{name}"
    for name in (
        *("errors", "allocator", "canonical", "catalog", "commands", "completion", "config", "console"),
        *("device", "files", "imports", "lazy", "locks", "parsing", "problems", "ray_workers", "threads"),
        "unions",
    )
}
ALLOWED = {
    "common": COMMON,
    "kernels": {"coursepack.kernels"},
    "data": COMMON | {"coursepack.kernels", "coursepack.data"},
    "models": COMMON | {"coursepack.kernels", "coursepack.models"},
    "pages": {"coursepack.errors", "coursepack.pages"},
    "precompute": COMMON
    | {f"coursepack.{name}" for name in ("kernels", "data", "models", "pages", "precompute")},
    "distill": COMMON | {f"coursepack.{name}" for name in ("kernels", "data", "models", "pages", "distill")},
}
"""What the modules of each folder may import of coursepack."""
FLOORS = (
    *(
        "schedule",
        "distributed",
        "losses",
        "fusion",
        "exchange",
        "objective_config",
        "finite",
        "objective",
        "methods",
        "recipe_file",
    ),
    *("recipe", "renamed", "recipe_names", "targets", "setup", "training", "runs", "report", "cli"),
)
"""Rooms of `distill` from the lowest up; a room imports from lower ones alone, but for types."""
SCRIPTS = ("tests", "examples", "benchmarks")
SKIPPED = {".venv", "build", "demo", ".git", ".hypothesis"}
MAX_LINES = 500


def sources(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) >= len(folders)
    return found


def statements(block):
    """Statements of a module or another block, and those within them."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for statement in getattr(block, field, ()):
            yield statement
            yield from statements(statement)


def imports_of(tree):
    """Dotted names that a module imports, in functions and under TYPE_CHECKING too."""
    for node in statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            if node.module == "coursepack":
                yield from (f"coursepack.{alias.name}" for alias in node.names)
            else:
                yield node.module


@functools.cache
def imports_in(path):
    """Dotted names that a file imports."""
    return tuple(imports_of(ast.parse(path.read_text())))


def strangers(names, allowed):
    """Imports of coursepack that are not allowed."""
    own = [name for name in names if name.split(".")[0] == "coursepack"]
    return [name for name in own if ".".join(name.split(".")[:2]) not in allowed]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_down_only(folder):
    for path in sources(folder):
        assert not strangers(imports_in(path), ALLOWED[folder]), path


@pytest.mark.parametrize(
    "text",
    [
        "import coursepack.distill",
        "from coursepack.distill import train",
        "from coursepack import distill",
        "from coursepack.distill.runs.train import train",
        "def later():\n    from coursepack.distill import train",
        "if TYPE_CHECKING:\n    import coursepack.distill as d",
    ],
)
def test_every_spelling_of_an_import_is_seen(text):
    names = list(imports_of(ast.parse(text)))
    assert strangers(names, ALLOWED["precompute"])
    assert not strangers(names, ALLOWED["distill"])
    assert not strangers(["coursepackage", "numpy"], set())


def runtime_imports(path):
    """Imports of a module that are not for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return [name for name in imports_of(tree) if name.startswith("coursepack.distill.")]


def test_rooms_of_distill_import_from_lower_ones():
    rooms = {path.relative_to(ROOT / "distill").parts[0].removesuffix(".py") for path in sources("distill")}
    assert rooms - {"__init__"} == set(FLOORS)
    for path in sources("distill"):
        room = path.relative_to(ROOT / "distill").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        floors = {name: FLOORS.index(name.split(".")[2]) for name in runtime_imports(path)}
        above = [name for name, floor in floors.items() if floor > FLOORS.index(room)]
        assert not above, path


def test_nothing_is_imported_by_a_folders_own_name():
    bare = {Path(folder).parts[0] for folder in FOLDERS.values()}
    for path in sources(*ALLOWED, *SCRIPTS):
        tops = {name.split(".")[0] for name in imports_in(path)}
        assert not tops & bare, path


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*ALLOWED, *SCRIPTS)}
    assert len(lengths) > 60
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_LINES}


def test_every_package_folder_is_listed():
    inits = [path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py")]
    found = {str(folder) for folder in inits if folder.parts[0] not in SKIPPED}
    assert set(FOLDERS.values()) == found
    assert SETUP["options"]["packages"].split() == list(FOLDERS)


def test_makefile_knows_every_folder():
    lines = (ROOT / "Makefile").read_text().splitlines()
    named = next(line for line in lines if line.startswith("FOLDERS :="))
    assert named.split()[2:] == list(FOLDERS.values())


def test_tests_are_flat():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    modules = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert modules == {"tests"}
