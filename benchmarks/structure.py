"""Size and structure of the code: files, floors and arrows of packages, lines, the longest file and function.

    python benchmarks/structure.py [--json FILE] [--quick]

The arrows of a package are the imports between its own modules, including subpackages, each counted once. Its
floors are the modules on the longest path along them. Both are reported without and with imports for type
checkers only. Lines are counted in the sources without tests, including docstrings and comments. The lines of
a method are those of its row, of the files of its terms and its fusion, which other methods may share, and of
the reference that its tests compare it with. Soft targets, labels and the default fusion are not counted.
"""

from __future__ import annotations

import ast
import functools
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
PACKAGES = ("common", "kernels", "data", "models", "pages", "precompute", "distill")
SCRIPTS = ("benchmarks", "examples")
DRAWN = ("distill", "kernels")
"""Packages whose import graph is measured."""
REFERENCES: dict[str, tuple[str, ...]] = {
    "ab": ("reference.adapters.boundary_loss",),
    "angle": ("reference.methods.angle_loss",),
    "at": ("reference.relations.at",),
    "cc": ("reference.relations.cc",),
    "confidence_hint": ("reference.teams.confident_error",),
    "crd": ("reference.adapters.contrast", "reference.adapters.remembered"),
    "discriminator": ("reference.teams.discriminator_loss",),
    "dist": ("reference.logits.dist",),
    "distance": ("reference.methods.distance_loss",),
    "dkd": ("reference.logits.dkd",),
    "fsp": ("reference.relations.fsp", "reference.relations.flow"),
    "ft": ("reference.adapters.factor_distance",),
    "hint": ("test_distill_hints.test_value_and_gradient",),
    "latents": ("test_distill_objective.test_adaptive_weights_and_their_gradients",),
    "nst": ("reference.relations.nst",),
    "ofd": ("reference.adapters.partial_distance",),
    "pkt": ("reference.relations.pkt",),
    "reviewkd": ("test_distill_reviewkd.reference",),
    "simkd": ("test_distill_simkd.test_a_larger_teacher_is_averaged_to_the_students_size",),
    "sp": ("reference.relations.sp",),
    "triplet_order": ("reference.teams.order_loss",),
    "vid": ("reference.adapters.gaussian_loss",),
    "virtual_teacher": ("reference.logits.virtual_teacher",),
    "adaptive": ("reference.methods.adaptive_weights",),
    "confidence": ("reference.methods.confidence_weights",),
    "entropy": ("reference.methods.entropy_weights",),
    "min_norm": ("reference.teams.min_norm", "reference.teams.logit_gradients"),
    "unify": tuple(
        f"reference.unify.{form}"
        for form in ("cross_entropy", "factorization", "logit_factorization", "mean")
    ),
}
"""Functions of the tests that compute a term or the weights of a fusion by its formula."""


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


def method_lines() -> dict[str, tuple[int, int]]:
    """Return two numbers of lines by method: its row and the files of its terms and fusion; its reference."""
    rows, found = _row_lines(), {}
    for name, method in METHODS.items():
        parts: dict[str, Any] = {term.term: LOSSES[term.term] for term in method.objective.terms.values()}
        fusion = method.objective.fusion.name
        parts |= {} if fusion == ObjectiveConfig().fusion.name else {fusion: FUSIONS[fusion]}
        files = {inspect.getfile(part.config) for part in parts.values()}
        code = rows[name] + sum(len(Path(file).read_text().splitlines()) for file in files)
        functions = {
            function for part in parts for each in REFERENCES.get(part, ()) for function in _called(each)
        }
        found[name] = code, sum(map(_function_lines, functions))
    return found


def _called(function: str) -> set[str]:
    """Return a function of the tests, as module.name, with all that it calls in its module, at any depth."""
    module, _, name = function.rpartition(".")
    found, waiting = set(), {name}
    while waiting:
        name = waiting.pop()
        found.add(name)
        names = {node.id for node in ast.walk(_test_functions(module)[name]) if isinstance(node, ast.Name)}
        waiting |= (names & _test_functions(module).keys()) - found
    return {f"{module}.{name}" for name in found}


def _function_lines(function: str) -> int:
    module, _, name = function.rpartition(".")
    node = _test_functions(module)[name]
    return (node.end_lineno or node.lineno) - node.lineno + 1


@functools.cache
def _test_functions(module: str) -> dict[str, ast.FunctionDef]:
    """Return the functions of a module of the tests by name."""
    path = ROOT / "tests" / Path(*module.split(".")).with_suffix(".py")
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


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
    return [
        *rows,
        *_method_rows(),
        row("longest file", [float(len(held[longest]))], "lines", {"where": str(longest.relative_to(ROOT))}),
        row("longest function", [float(size)], "lines", {"where": where}),
    ]


def _method_rows() -> list[dict[str, Any]]:
    """Return median and largest number of lines of the methods, without and with their references."""
    by_method, rows = method_lines(), []
    for what, lines in (
        ("", {name: code for name, (code, _) in by_method.items()}),
        (" with their references", {name: sum(both) for name, both in by_method.items()}),
    ):
        config, largest = {"methods": len(lines)}, max(lines, key=lambda name: lines[name])
        rows += [
            row(f"methods{what}: median of lines", [float(median(lines.values()))], "lines", config),
            row(f"methods{what}: most lines", [float(lines[largest])], "lines", config | {"where": largest}),
        ]
    return rows


def main() -> None:
    options = arguments(__doc__.partition("\n")[0]).parse_args()
    rows = structure()
    cells = [
        [entry["id"], f"{entry['value']:,.0f}", entry["unit"], entry["config"].get("where", "")]
        for entry in rows
    ]
    print_table("Structure", ["figure", "value", "unit"], [cell[:3] for cell in cells])
    by_method = [[name, str(code), str(reference)] for name, (code, reference) in method_lines().items()]
    print_table("Lines of the methods", ["method", "row and files", "reference"], by_method)
    print("\n".join(f"{name}: {where}" for name, _, _, where in cells if where))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
