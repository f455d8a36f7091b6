"""The house: which package may import which, how long files get, and that none is forgotten."""

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
FOLDERS = dict(line.split(" = ") for line in SETUP["options"]["package_dir"].split("\n") if line)
"""Package to folder."""
COMMON = {
    f"coursepack.{name}"
    for name in ("errors", "canonical", "config", "console", "files", "locks", "own_code", "parsing")
}
ALLOWED = {
    "common": COMMON,
    "kernels": {"coursepack.kernels"},
    "data": COMMON | {"coursepack.kernels", "coursepack.data"},
    "models": COMMON | {"coursepack.kernels", "coursepack.models"},
    "precompute": COMMON | {f"coursepack.{name}" for name in ("kernels", "data", "models", "precompute")},
    "distill": COMMON | {f"coursepack.{name}" for name in ("kernels", "data", "models", "distill")},
}
"""What the modules of each folder may import of coursepack."""
SCRIPTS = ("tests", "examples", "benchmarks")
SKIPPED = {".venv", "build", "demo", ".git", ".hypothesis"}
MOST_LINES = 500


def sources(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) >= len(folders)
    return found


def imports_of(tree):
    """Dotted names that a module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            if node.module == "coursepack":
                yield from (f"coursepack.{alias.name}" for alias in node.names)
            else:
                yield node.module


def strangers(text, allowed):
    """Imports of coursepack that are not allowed."""
    own = [name for name in imports_of(ast.parse(text)) if name.split(".")[0] == "coursepack"]
    return [name for name in own if ".".join(name.split(".")[:2]) not in allowed]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_down_only(folder):
    for path in sources(folder):
        assert not strangers(path.read_text(), ALLOWED[folder]), path


@pytest.mark.parametrize(
    "text",
    [
        "import coursepack.distill",
        "from coursepack.distill import train",
        "from coursepack import distill",
        "from coursepack.distill.train import train",
        "def later():\n    from coursepack.distill import train",
        "if TYPE_CHECKING:\n    import coursepack.distill as d",
    ],
)
def test_every_spelling_of_an_import_is_seen(text):
    assert strangers(text, ALLOWED["precompute"])
    assert not strangers(text, ALLOWED["distill"])
    assert not strangers("import coursepackage\nimport numpy", set())


def test_nothing_is_imported_by_a_folders_own_name():
    bare = {Path(folder).parts[0] for folder in FOLDERS.values()}
    for path in sources(*ALLOWED, *SCRIPTS):
        tops = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()))}
        assert not tops & bare, path


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*ALLOWED, *SCRIPTS)}
    assert len(lengths) > 60
    assert not {path: lines for path, lines in lengths.items() if lines > MOST_LINES}


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
