"""Size and structure of the code: files, floors and arrows of packages, lines, the longest file and function.

    python benchmarks/structure.py [--json FILE] [--quick]

The arrows of a package are the imports between its own modules, including subpackages, each counted once. Its
floors are the modules on the longest path along them. Both are reported without and with imports for type
checkers only. Lines are counted in the sources without tests, including docstrings and comments. The lines of
a method are those of its row and of the files of its terms and its fusion, which other methods may share. The
files of soft targets, labels and the default fusion are not counted.
"""

from __future__ import annotations

import ast
import inspect
import json
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from _harness import arguments, machine, row

from coursepack.console import print_table
from coursepack.distill.fusion import FUSIONS
from coursepack.distill.losses import LOSSES
from coursepack.distill.methods import METHODS
from coursepack.distill.objective_config import ObjectiveConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "kernels", "data", "models", "precompute", "distill")
SCRIPTS = ("benchmarks", "examples")
DRAWN = ("distill", "kernels")
"""Packages whose import graph is measured."""


def modules(folder: str) -> dict[str, Path]:
    """Return the files of a package by import name."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("coursepack", *parts)).removesuffix(".__init__")
        found[name] = path
    return found


def is_for_checkers(node: ast.AST) -> bool:
    """Return True if a node is an `if TYPE_CHECKING:` block."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports(tree: ast.AST, name: str, known: Mapping[str, Path], *, typed: bool) -> Iterator[str]:
    """Yield the modules in `known` that a module imports, with `typed` also those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if is_for_checkers(node) and not typed:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, name, known)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in known or base in known:
                    yield inner if inner in known else base
        yield from imports(node, name, known, typed=typed)


def _base(node: ast.ImportFrom, name: str, known: Mapping[str, Path]) -> str:
    """Return the absolute name of the module in `from ... import`."""
    if node.level == 0:
        return node.module or ""
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def graph(folder: str, *, typed: bool = False) -> dict[str, set[str]]:
    """Return the imports between modules of a package, with `typed` also those for type checkers only."""
    known = modules(folder)
    return {
        name: set(imports(ast.parse(path.read_text()), name, known, typed=typed)) - {name}
        for name, path in known.items()
    }


def longest_path(found: Mapping[str, set[str]]) -> list[str]:
    """Return the modules on the longest path, importing ones first, or no modules if imports are circular."""
    best: dict[str, list[str]] = {}
    try:
        for name in TopologicalSorter(found).static_order():
            below = max((best[other] for other in sorted(found[name])), key=len, default=[])
            best[name] = [name, *below]
    except CycleError as error:
        print(f"imports go in a circle: {' <- '.join(error.args[1])}")
        return []
    return max(best.values(), key=len)


def lines(folders: tuple[str, ...]) -> dict[Path, list[str]]:
    """Return the lines of every source file in some folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path: path.read_text().splitlines() for path in paths}


def longest_function(paths: Mapping[Path, list[str]]) -> tuple[int, str]:
    """Return the number of lines of the longest function, without decorators, and its location."""
    found = [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}")
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None
    ]
    return max(found)


def method_lines() -> dict[str, int]:
    """Return the lines of every method: its row, and the files of its own terms and fusion."""
    rows, found = _row_lines(), {}
    for name, method in METHODS.items():
        terms = [LOSSES[term.term] for term in method.objective.terms.values()]
        fusion = method.objective.fusion.name
        parts = [*terms, *([] if fusion == ObjectiveConfig().fusion.name else [FUSIONS[fusion]])]
        files = {inspect.getfile(part.config) for part in parts}
        found[name] = rows[name] + sum(len(Path(file).read_text().splitlines()) for file in files)
    return found


def _row_lines() -> dict[str, int]:
    """Return the lines of every method's row in the table of its family."""
    return {
        key.value: value.end_lineno - key.lineno + 1
        for path in (ROOT / "distill" / "methods").glob("*.py")
        for table in ast.walk(ast.parse(path.read_text()))
        if isinstance(table, ast.Dict)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant)
        and isinstance(value, ast.Call)
        and ast.unparse(value.func) == "Method"
        and value.end_lineno is not None
    }


def structure() -> list[dict[str, Any]]:
    """Return every figure as a row."""
    rows = []
    for folder in DRAWN:
        rows.append(row(f"{folder}: files", [float(len(modules(folder)))], "files", {}))
        for typed, which in ((False, ""), (True, " for type checkers too")):
            found = graph(folder, typed=typed)
            path = longest_path(found)
            names = [name.removeprefix(f"coursepack.{folder}").lstrip(".") or "__init__" for name in path]
            arrows = sum(map(len, found.values()))
            rows += [
                row(f"{folder}: floors{which}", [float(len(path))], "modules", {"where": " > ".join(names)}),
                row(f"{folder}: arrows{which}", [float(arrows)], "imports", {}),
            ]
    for title, folders in (("packages", PACKAGES), ("with benchmarks and examples", PACKAGES + SCRIPTS)):
        held = lines(folders)
        written = [[line for line in each if line.strip()] for each in held.values()]
        config = {"folders": list(folders), "files": len(held)}
        rows += [
            row(f"{title}: lines", [float(sum(map(len, held.values())))], "lines", config),
            row(f"{title}: lines not blank", [float(sum(map(len, written)))], "lines", config),
        ]
    held = lines(PACKAGES)
    longest = max(held, key=lambda path: len(held[path]))
    size, where = longest_function(held)
    by_method = method_lines()
    largest, config = max(by_method, key=lambda name: by_method[name]), {"methods": len(by_method)}
    return [
        *rows,
        row("methods: median of lines", [float(median(by_method.values()))], "lines", config),
        row("methods: most lines", [float(by_method[largest])], "lines", config | {"where": largest}),
        row("longest file", [float(len(held[longest]))], "lines", {"where": str(longest.relative_to(ROOT))}),
        row("longest function", [float(size)], "lines", {"where": where}),
    ]


def main() -> None:
    options = arguments(__doc__.partition("\n")[0]).parse_args()
    rows = structure()
    cells = [
        [entry["id"], f"{entry['value']:,.0f}", entry["unit"], entry["config"].get("where", "")]
        for entry in rows
    ]
    print_table("Structure", ["figure", "value", "unit"], [cell[:3] for cell in cells])
    print("\n".join(f"{name}: {where}" for name, _, _, where in cells if where))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
