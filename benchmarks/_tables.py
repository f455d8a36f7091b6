"""Layouts of the tables in README and docs: Markdown from the rows of `benchmarks/results/*.json`."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
PENDING = {"gpu": "Not run: no GPU was at hand."}
"""Line in place of the machine of results that may not exist yet; their tables are empty."""
VERSIONS = ("python", "coursepack", "torch", "numpy", "numba", "zarr")


def load(name: str) -> dict[str, Any]:
    """Return the machine and the rows of one results file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def is_pending(name: str) -> bool:
    """Return whether results that may be missing are missing."""
    return name in PENDING and not (RESULTS / f"{name}.json").exists()


def caption(name: str) -> list[str]:
    """Return the line with the machine, the versions and the date of the measurement."""
    if is_pending(name):
        return [PENDING[name]]
    where = load(name)["machine"]
    parts = [where["processor"], f"{where['threads']} torch thread{'s' if where['threads'] > 1 else ''}"]
    parts += [where["device"]] if where["device"] != "cpu" else []
    parts += [f"{version.capitalize() if version == 'python' else version} {where[version]}"
              for version in VERSIONS if version in where]  # fmt: skip
    return [f"{', '.join(parts)}, {where['date']}." + (f" {where['note']}" if "note" in where else "")]


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]


def number(value: float) -> str:
    """Return four digits of a number, with commas between thousands.

    >>> number(1316.6), number(0.92491), number(51752.3)
    ('1,317', '0.9249', '51,752')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread(row: Row, form: Callable[[float], str] = number) -> str:
    """Return the interval of a row, if it has one."""
    if row["low"] is None or row["low"] == row["high"]:
        return "-"
    kind = row["config"].get("interval")
    ends = f"{form(row['low'])} to {form(row['high'])}"
    return ends if kind in (None, "quartiles") else f"{ends} ({kind})"


def listed(name: str, pattern: str) -> list[str]:
    """Return one line per row whose id matches, with all values of the row."""
    if is_pending(name):
        return []
    date, lines = load(name)["machine"]["date"], []
    for row in load(name)["rows"]:
        if not re.fullmatch(pattern, row["id"]):
            continue
        day = row["config"].get("date", date)
        holds = {None: "-", "no": "**no**"}.get(row["holds"], row["holds"])
        figure = row["id"] if day == date else f"{row['id']} ({day})"
        unit = "" if row["unit"] in ("ratio", "x") else f" {row['unit']}"
        lines.append(
            [figure, number(row["value"]) + unit, spread(row), str(row["n"]), row["bar"] or "-", holds]
        )
    if not lines:
        return ["Not measured yet."]
    return table(["figure", "value", "low to high", "n", "bar", "holds"], lines)


def pivot(
    name: str,
    pattern: str,
    corner: str,
    columns: dict[str, str] | None = None,
    cell: Callable[[Row], str] | None = None,
) -> list[str]:
    """Return a table of the rows whose id matches, by the pattern's groups `line*` and `column*`."""
    cells: dict[str, dict[str, Row]] = {}
    for row in load(name)["rows"]:
        if found := re.fullmatch(pattern, row["id"]):
            groups = found.groupdict().items()
            line, column = (
                ", ".join(value for key, value in groups if value is not None and key.startswith(which))
                for which in ("line", "column")
            )
            cells.setdefault(line, {})[column] = row
    names = columns or {column: column for line in cells.values() for column in line}
    header = [corner]
    for column, title in names.items():
        bars = sorted({line[column]["bar"] for line in cells.values() if column in line} - {None})
        header.append(f"{title} ({', '.join(bars)})" if bars else title)
    form = cell or compact
    lines = [
        [line, *(form(found[column]) if column in found else "-" for column in names)]
        for line, found in cells.items()
    ]
    return table(header, lines)


def compact(row: Row, form: Callable[[float], str] = number) -> str:
    """Return value and interval in one cell: bold if the bar does not hold, with a `?` if it is undecided."""
    text = number(row["value"])
    if row["unit"].startswith("ratio"):
        text = form(row["value"])
        if spread(row) != "-":
            text += f" ({form(row['low'])} to {form(row['high'])})"
    return {"no": f"**{text}**", "undecided": f"{text} ?"}.get(row["holds"], text)


def two_digits(row: Row) -> str:
    """Return a value with two digits."""
    return f"{row['value']:.2g}"


def student_cell(row: Row) -> str:
    """Return an accuracy, or a difference as its bar marks it, with a `*` if its interval is beside zero."""
    text = percent(row) if row["unit"] == "%" else _sure(row)
    return {"no": f"**{text}**", "undecided": f"{text} ?"}.get(row["holds"], text)


def signed(row: Row) -> str:
    """Return a difference with its interval."""
    return f"{row['value']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"


def study(name: str, setting: str, against: str = "kd") -> list[str]:
    """Return the methods of one setting with their differences from one of them."""
    rows, lines = {row["id"]: row for row in load(name)["rows"]}, []
    for identifier, row in rows.items():
        if identifier.startswith(f"{setting}/") and not identifier.endswith((f" - {against}", ", refused")):
            config, less = row["config"], rows[f"{identifier} - {against}"]
            accuracy = f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            others = [f"{less['config']['p']:.3f}", f"{config['nll']:.3f}"]
            others += [f"{config['calibration error']:.3f}", f"{config['seconds']:.2f}"]
            method, diverged = identifier.partition("/")[2], config.get("diverged")
            method += f" ({diverged} of {row['n']} diverged)" if diverged else ""
            lines.append([method, accuracy, signed(less), *others])
    header = ["method", "accuracy, % (95 %)", f"minus {against} (95 %)", "p", "NLL", "ECE", "s a run"]
    return table(header, lines)


def settings(name: str) -> list[str]:
    """Return every method's difference from `kd` in every setting, and the accuracy of `kd`."""

    def cell(row: Row) -> str:
        if row["unit"] == "%":
            return f"{row['value']:.2f}"
        return signed(row) + ("*" if row["config"]["below 0.05"] else "")

    columns = {
        "plain": "three good teachers", "noisy": "a weak and a noisy one", "experts": "experts",
        "sure": "very confident",
    }  # fmt: skip
    pattern = r"(?P<column>\w+)/((?P<line>kd)|(?P<line_>.+) - kd)"
    return pivot(name, pattern, "method", columns, cell)


def peers_study() -> list[str]:
    """Return the accuracies of students that learn from each other, and of their ensembles."""
    rows, lines = {row["id"]: row for row in load("peers")["rows"]}, []
    for identifier, row in rows.items():
        if not identifier.startswith("study: ") or identifier.endswith((" - alone", ", ensemble")):
            continue
        less, together = rows[f"{identifier} - alone"], rows.get(f"{identifier}, ensemble")
        cells = [percent(row), _sure(less) if row is not rows["study: alone"] else "-"]
        name = identifier.removeprefix("study: ")
        lines.append([name, *cells, "-" if together is None else percent(together)])
    header = ["method, students", "accuracy, % (95 %)", "minus alone (95 %)", "ensemble, % (95 %)"]
    return table(header, lines)


def percent(row: Row) -> str:
    """Return an accuracy with its interval."""
    return f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _sure(row: Row) -> str:
    """Return a difference with its interval, and a `*` if the interval leaves out zero."""
    row = {**row, "value": round(row["value"], 2) + 0.0}  # no -0.00
    return signed(row) + ("*" if row["low"] > 0 or row["high"] < 0 else "")


def cost(row: Row) -> str:
    """Return bytes in megabytes, and ratios with their interval."""
    return f"{row['value'] / 1e6:,.2f}" if row["unit"] == "bytes" else compact(row, "{:.3f}".format)


def demo_accuracy() -> list[str]:
    """Return the accuracies of the demo's students."""
    rows = {row["id"]: row for row in load("demo")["rows"]}
    rates = [
        identifier.partition("alone, lr ")[2] for identifier in rows if identifier.startswith("alone, lr ")
    ]
    lines = []
    for rate in rates:
        kinds = (rows[f"{kind}, lr {rate}"] for kind in ("alone", "from stores"))
        cells = [f"{row['value']:.2f} % ± {row['config']['sd']:.2f}" for row in kinds]
        wins = rows[f"seeds better from stores, lr {rate}"]
        lines.append([rate, *cells, f"{wins['value']:.0f} of {wins['n']}"])
    return table(["learning rate", "alone", "from stores", "wins"], lines)


def demo_time() -> list[str]:
    """Return the cost of teachers in the demo, once and per epoch."""
    rows = {row["id"]: row for row in load("demo")["rows"]}

    def epoch(kind: str) -> str:
        return f"{rows[f'epoch {kind}']['value']:.1f} ms ({rows[f'epoch {kind} / plain']['value']:.2f} times)"

    once = rows["teachers, once, all views"]["value"] / 1000
    lines = [
        ["three teachers, 8 views of all training digits, paid once", f"{once:.1f} s"],
        ["student epoch of 300 samples, no teacher", f"{rows['plain epoch']['value']:.1f} ms"],
        ["from stores", epoch("from stores")],
        ["with the teachers run live", epoch("with live teachers")],
    ]
    return table(["what", "time"], lines)


def view_students(lines: str, base: str) -> list[str]:
    """Return accuracies of students by their views, with differences from those of other views."""
    columns = {}
    for method in ("kd", "fitnets"):
        columns |= {method: f"{method}, % (95 %)", f"{method} - {base}": f"minus {base}"}
    return pivot("views-students", rf"{lines}: (?P<column>.+)", "views", columns, student_cell)


LOSS = {
    "ours": "ours", "naive": "naive", "compile": "compile", "analytic": "analytic", "kernel": "kernel",
    "floor": "floor", "exponentials": "exponentials", "autograd": "autograd",
    "ours / naive": "/ naive", "(exponentials + autograd) / naive": "limit / naive",
    "ours / compile": "/ compile", "(exponentials + autograd) / compile": "limit / compile",
    "kernel / floor": "kernel / floor", "ours / floor": "ours / floor",
}  # fmt: skip
EPOCHS = {
    f"{over} / {under}": over if under == "plain" else f"{over} / {under}"
    for over, under in [*((name, "plain") for name in ("kd float16", "kd int8", "amtml", "amtml-hints")),
                        ("plain", "minimal")]
}  # fmt: skip

COSTS = {
    "step / plain": "step / plain", "(store - memory) / plain": "(store - memory) / plain",
    "step - plain": "store adds, ms", "live step - plain": "live teacher adds, ms",
    "cached / live": "store / live", "view minimal": "view, MB", "view full": "unreduced, MB",
    "extra memory": "beside the student, MB",
}  # fmt: skip
HUNDREDTHS, THOUSANDTHS = (partial(compact, form=form.format) for form in ("{:.2f}", "{:.3f}"))

TABLES: dict[str, Callable[[], list[str]]] = {
    "demo accuracy": demo_accuracy,
    "demo time": demo_time,
    "demo accuracy rows": partial(listed, "demo", r"teacher .*|.*, lr .*"),
    "demo time rows": partial(listed, "demo", r".*epoch.*|teachers, once.*"),
    "store": partial(listed, "store", r"(?!KL ).*"),
    "store, another machine": partial(
        listed, "store-epyc", r"(speed vs memory|four teachers|student step, |int8 gather|topk).*"
    ),
    "fidelity": partial(
        pivot, "fidelity", r"KL (?P<line>.+) (?P<column>T=\d+)", "logits and rows", None, two_digits
    ),
    "fidelity, nearest": partial(
        pivot, "fidelity", r"nearest of others / ours: (?P<line>.+) (?P<column>T=\d+)",
        "logits, bytes a view", None, HUNDREDTHS,
    ),
    "fidelity, students": partial(
        pivot, "fidelity", r"student from (?P<line>.+?) (?P<column>T=\d+( - float32)?)", "rows", None,
        student_cell,
    ),
    "simulation": partial(listed, "simulation", r".*"),
    "memory": partial(pivot, "memory", r"(?P<line>.+): (?P<column>.+)", "store"),
    "allocator": partial(listed, "allocator", r".*"),
    "views": partial(listed, "views", r".*"),
    "views, how many": partial(view_students, r"(?P<line>\d+ views?|a new view every epoch)", "new views"),
    "views, per load": partial(view_students, r"(?P<line>\d+ views? per load)", "one view"),
    "views, from JPEG": partial(listed, "views-training", r".*"),
    "sources": partial(listed, "sources", r".*"),
    "precompute throughput": partial(listed, "precompute", r".*forward alone"),
    "precompute pipeline": partial(listed, "precompute", r"simulated device.*|four teachers.*"),
    "precompute memory": partial(listed, "precompute", r"memory: .*"),
    "loss, 1 thread": partial(
        pivot, "loss", r"\((?P<line>[\d,]+)\) 1 thread (?P<column>.+)", "N, C, K", LOSS, HUNDREDTHS
    ),
    "loss, 2 threads": partial(
        pivot, "loss", r"\((?P<line>[\d,]+)\) 2 threads (?P<column>.+)", "N, C, K", LOSS, HUNDREDTHS
    ),
    "loss of encoded rows": partial(
        pivot, "loss", r"(?P<line>\([\d,]+\) \d threads?) (?P<column>\S+) rows / float16 rows",
        "time over that of float16 rows", None, HUNDREDTHS,
    ),
    "loss memory": partial(
        pivot, "loss", r"peak extra memory, (?P<line>K=\d), (?P<column>.+)", "in N · C · 4 bytes"
    ),
    "loss errors": partial(
        pivot, "loss", r"largest error of the (?P<line>.+) / bound, (?P<column>T=\d+)", "largest error"
    ),
    "loss also": partial(listed, "loss", r"(soft_targets|teacher_stats|reverse_kl|js|mse) / .*|first call.*"),
    "train steps": partial(pivot, "train", r"step: (?P<line>.+), (?P<column>.+)", "ms per step"),
    "train epochs": partial(
        pivot, "train", r"epoch: (?P<line>.+), (?P<column>.+)", "epoch / plain epoch", EPOCHS, THOUSANDTHS
    ),
    "train live": partial(
        pivot, "train", r"live: (?P<line>\d+ teachers?), (?P<column>.+)", "live teachers", None, HUNDREDTHS
    ),
    "train precompute": partial(
        pivot, "train", r"precompute: (?P<line>[^,]+), (?P<column>.+)", "`precompute run`",
        {"bare forward": "bare forward, images/s", "run / bare forward": "run / bare forward"},
    ),
    "train sweep": partial(
        pivot, "train", r"sweep: (?P<line>.+?)(?P<column>| / single runs)", "ten students",
        {"": "seconds", " / single runs": "/ single runs"},
    ),
    "train hints": partial(listed, "train", r"hints: .*"),
    "train growth": partial(listed, "train", r"growth: .*|start-up.*|first step.*"),
    "remote": partial(listed, "remote", r".*"),
    "gpu loss": partial(listed, "gpu", r"loss .*"),
    "gpu encodings": partial(listed, "gpu", r"rows .*"),
    "gpu views": partial(listed, "gpu", r"view .*"),
    "gpu students": partial(listed, "gpu", r"(epoch|step) of .*"),
    "gpu stage one": partial(listed, "gpu", r"stage one, .*"),
    "methods, good teachers": partial(study, "methods", "plain"),
    "methods, weak and noisy teachers": partial(study, "methods", "noisy"),
    "methods, experts": partial(study, "methods", "experts"),
    "methods, confident teachers": partial(study, "methods", "sure"),
    "methods, a mistaken teacher": partial(study, "methods", "mistaken"),
    "methods, other teachers": partial(settings, "methods-other-teachers"),
    "methods, teachers' time": partial(listed, "methods", "teacher-hours-saved"),
    "peers study": peers_study,
    "peers steps": partial(listed, "peers", r"step: .*"),
    **{
        f"methods, cost: {student}": partial(
            pivot, "methods-cost", rf"cost: {student}, (?P<line>[\w-]+), (?P<column>.+)", "method", COSTS,
            cost,
        )
        for student in ("resnet8x4", "wrn-16-2")
    },
    "methods, own numbers": partial(study, "methods-presets", "presets"),
    "classes": partial(study, "classes", "classes", "naive"),
    "classes: targets": partial(
        pivot, "classes", r"targets: (?P<line>[\w-]+), (?P<column>.+)", "targets"
    ),
    "sequences: takd": partial(study, "sequences", "takd", "direct"),
    "sequences: generations": partial(study, "sequences", "generations", "from-labels"),
    "sequences: path": partial(study, "sequences", "path", "kd-from-last"),
    "sequences: sequence": partial(study, "sequences", "sequence"),
    "sequences: monitored, good": partial(study, "sequences", "monitored-plain", "monitored"),
    "sequences: monitored, weak and noisy": partial(study, "sequences", "monitored-noisy", "monitored"),
    "sequences: monitored, experts": partial(study, "sequences", "monitored-experts", "monitored"),
    "sequences: monitored, confident": partial(study, "sequences", "monitored-sure", "monitored"),
    "sequences: tf-kd": partial(study, "sequences", "tf-kd", "label-smoothing"),
}  # fmt: skip
