"""Digests of metrics and of weights after ten training steps, for every method and many variations.

    python benchmarks/method_bits.py [--json FILE] [--compare FILE] [--quick]

The benchmark shows that a change of the code changes no number: write the table with --json before the
change, and compare with --compare after it, on the same machine. Only public names are used: the commands,
and the files of a run. Teachers, stores and students are created in a temporary folder, on the CPU, with one
thread.

A digest of metrics covers all numbers in `metrics.jsonl` except times, without their names, so metrics can be
renamed. Rows that are in only one of the files are listed; the exit status is 1 if a row is missing or
differs. Refused combinations are rows too; the text of the refusal is not compared. Bits depend on processor
and versions, so a file is valid on one machine only.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _harness import arguments, machine, row
from click.testing import CliRunner

from coursepack.console import print_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

STUDENT = ("--student", "digits-cnn", "--lr", "0.01", "--epochs", "2")
SMALL = ("--limit", "160", "--batch-size", "32")
WHOLE = ("--batch-size", "320")
"""Flags for five steps per epoch, like `SMALL`, on the whole split, which mixed images need for partners."""
TEACHERS = {"mlp": "hidden1", "cnn": "conv2", "resnet": "layer2"}
"""Taps for hints, by teacher."""
MIXED_VIEW = "ops: [{op: pad_crop, padding: 1}]\nreference_size: 8\nmix: {mixup_alpha: 0.8}\n"
FAKE = "fake,classes=100,size=8,samples=400,channels=1"
"""Source with many classes, for top-k rows."""

STORES: dict[str, tuple[str, ...]] = {
    "float16": ("mlp-float16", "cnn-float16", "resnet-float16"),
    "int8": ("mlp-int8", "cnn-int8", "resnet-int8"),
    "topk": ("fake0-topk", "fake1-topk"),
    "mixed": ("mlp-mixed", "cnn-mixed"),
    "one": ("cnn-float16",),
    "none": (),
}
FOR_METHODS = ("float16", "int8", "topk", "mixed")
"""Stores that every method is run on. Refused combinations are rows too."""
PHASES = {
    "ab": "--set objective.hard_weight.epochs=1 --set objective.terms.ab.weight.epochs=1",
    "ft": "--set objective.terms.ft.paraphraser_epochs=1",
}
"""Flags of methods whose first phase is shortened to one of the two epochs."""

_ALONE = "--source digits --view digits"
VARIATIONS: dict[str, tuple[str, str]] = {
    "seed": ("float16", "--method kd --seed 1"),
    "one teacher": ("one", "--method kd"),
    "teacher weights": ("float16", "--method kd --teacher-weights 0.5,0.3,0.2"),
    "temperature": ("float16", "--method kd --temperature 2 --hard-weight 0.5"),
    "accumulate": ("float16", "--method kd --accumulate 2"),
    "ema": ("float16", "--method kd --ema 0.9"),
    "clip and cosine": ("float16", "--method kd --clip 1 --lr-schedule cosine --warmup-epochs 1"),
    "one cycle": ("float16", "--method kd --lr-schedule one_cycle"),
    "bfloat16": ("float16", "--method kd --precision bfloat16"),
    "bfloat16 hints": ("float16", "--method amtml-hints --precision bfloat16"),
    "channels last": ("float16", "--method kd --channels-last"),
    "batch norm": ("float16", "--method kd --set student=digits-resnet"),
    "views per load": ("float16", "--method kd --views-per-load 2"),
    "shuffled views": ("float16", "--method kd --view-order shuffled --epochs 4"),
    "patience": ("float16", "--method kd --patience 1 --epochs 4"),
    "mapped": ("float16", "--method ca-mkd --set reading=mapped"),
    "windowed": ("float16", "--method ca-mkd --set reading=windowed"),
    "label smoothing": ("float16", "--method kd --label-smoothing 0.1"),
    "label smoothing mixed": ("mixed", "--method kd --label-smoothing 0.1"),
    "sum": ("float16", "--method kd --set objective.combine=sum"),
    "mixture": ("float16", "--method ca-mkd --set objective.combine=mixture"),
    "adjustment each": ("float16", "--method kd --set objective.adjustment=[shift,none,smooth]"),
    "warm-up": ("float16", "--method kd --set 'objective.soft_weight={shape: warmup, end: 0.9, epochs: 2}'"),
    "relations": (
        "float16",
        "--method kd --set objective.terms.angle.weight=50 --set objective.terms.distance.weight=25",
    ),
    "relations of logits": (
        "float16",
        "--method amtml --set objective.terms.angle.student=logits "
        "--set 'objective.terms.distance={student: logits}'",
    ),
    "hints": ("float16", "--method kd --set objective.terms.hint.weight=0.01"),
    "hints alone": ("float16", "--method kd --soft-weight 0 --set objective.terms.hint.weight=0.01"),
    "hints int8": ("int8", "--method kd --set objective.terms.hint.weight=0.01"),
    "latents in phases": (
        "float16",
        "--method amtml --set objective.fusion.joint_epochs=1 --set objective.fusion.layer=conv2",
    ),
    "small latents": ("float16", "--method amtml --set objective.fusion.init=0.1"),
    "boundaries": (
        "one",
        f"--method ab {PHASES['ab']} "
        "--set 'objective.terms.ab.pairs=[{teacher: 0, tap: conv2, layer: conv2}]'",
    ),
    "attention": ("one", "--method at"),
    "best given": (
        "float16",
        "--method best --set objective.fusion.name=best --set objective.fusion.teacher=1",
    ),
    "mild temperatures": (
        "float16",
        "--method dtd-flsw --temperature 4 --set objective.dynamic_temperature.slope=4 "
        "--set objective.dynamic_temperature.gamma=2",
    ),
    "adjusted and weighed": ("float16", "--method ka-ps --set objective.fusion.name=confidence"),
    "online": ("float16", "--method kd --online"),
    "online ka-dtd": ("float16", "--method ka-dtd --online"),
    "online hints": ("float16", "--method amtml-hints --online"),
    "online mixed": ("mixed", "--method ca-mkd --online"),
    "alone": ("none", f"--method supervised {_ALONE}"),
    "alone seed": ("none", f"--method supervised {_ALONE} --seed 1"),
    "alone smoothed": ("none", f"--method supervised {_ALONE} --label-smoothing 0.2"),
    "alone two views": ("none", f"--method supervised {_ALONE} --views 2 --epochs 4"),
}
"""Stores and flags of further cases."""
QUICK = ("kd float16", "amtml float16", "dtd-flsw topk", "alone")


def run(command: str, words: list[str]) -> str | None:
    """Run a command of the package in this process, and return its error message if it is refused."""
    (found,) = (each for each in entry_points(group="console_scripts") if each.name == command)
    result = CliRunner().invoke(found.load(), words)
    if result.exit_code == 0:
        return None
    if not isinstance(result.exception, SystemExit):
        raise result.exception or RuntimeError(result.output)
    return result.output.strip()


def must(command: str, *words: str) -> None:
    """Run a command that must succeed."""
    refused = run(command, list(words))
    if refused is not None:
        sys.exit(f"{command} {' '.join(words)}: {refused}")


def make_stores(folder: Path) -> None:
    """Train teachers briefly and write their stores."""
    (folder / "mixed.yaml").write_text(MIXED_VIEW)
    common = ("--views", "2")
    for name, tap in TEACHERS.items():
        run_folder = str(folder / name)
        how = ("--view", "digits", "--limit", "600", "--epochs", "3", "--lr", "0.03", "--threads", "1")
        must(
            "distill", "train", "--student", f"digits-{name}", "--source", "digits", *how, "--out", run_folder
        )
        teacher = ("--teacher", f"run:{run_folder}", "--source", "digits", *common)
        for encoding in ("float16", "int8"):
            kept = ("--encoding", encoding, "--feature-encoding", encoding, "--tap", tap)
            store = str(folder / f"{name}-{encoding}.zarr")
            must("precompute", "run", *teacher, "--view", "digits", *kept, "--store", store)
        if name != "resnet":
            view = ("--view", str(folder / "mixed.yaml"))
            must(
                "precompute",
                "run",
                *teacher,
                *view,
                "--tap",
                tap,
                "--store",
                str(folder / f"{name}-mixed.zarr"),
            )
    for seed in ("0", "1"):
        run_folder = str(folder / f"fake{seed}")
        how = ("--view", "digits", "--epochs", "2", "--seed", seed, "--threads", "1")
        must("distill", "train", "--student", "digits-cnn", "--source", FAKE, *how, "--out", run_folder)
        store = str(folder / f"fake{seed}-topk.zarr")
        words = ("--teacher", f"run:{run_folder}", "--source", FAKE, "--view", "digits", *common)
        must("precompute", "run", *words, "--encoding", "topk:5", "--store", store)


def cases(methods: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name, stores and flags of every case."""
    for method in methods:
        if method != "supervised":
            for stores in FOR_METHODS:
                yield f"{method} {stores}", stores, ["--method", method, *shlex.split(PHASES.get(method, ""))]
    for name, (stores, flags) in VARIATIONS.items():
        yield name, stores, shlex.split(flags)


def measure(name: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Train one student, and return the digests of its metrics and weights."""
    out = folder / "runs" / name.replace(" ", "-")
    refused = run("distill", ["train", *words, "--threads", "1", "--out", str(out)])
    if refused is not None:
        return row(name, [0.0], "refused", {"refused": refused.replace(str(folder), "FOLDER")})
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = dict(flat(records))
    weights = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors")):
        weights.update(path.name.encode() + path.read_bytes())
    config = {"metrics": digest(numbers), "weights": weights.hexdigest(), "numbers": numbers}
    return row(name, [records[-1]["train"]["loss"]], "nats", config)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the name and value of every number in nested metrics except times."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        if isinstance(value, (int, float)):
            yield name, value
        return
    for key, each in items:
        if key != "seconds":
            yield from flat(each, f"{name}.{key}".lstrip("."))


def digest(numbers: Mapping[str, float]) -> str:
    """Return the sha256 of the sorted numbers, independent of their names."""
    return hashlib.sha256("\n".join(map(repr, sorted(numbers.values()))).encode()).hexdigest()


def differences(rows: list[dict[str, Any]], path: Path, *, quick: bool) -> list[str]:
    """Return a line for each row of an earlier file that is missing or differs, and print new rows."""
    told = json.loads(path.read_text())
    for key in ("processor", "torch", "numpy", "numba"):
        if told["machine"].get(key) != machine().get(key):
            print(f"{key} was {told['machine'].get(key)!r}, is {machine().get(key)!r}: bits may differ")
    now = {each["id"]: each for each in rows}
    earlier = {each["id"]: each for each in told["rows"] if not quick or each["id"] in QUICK}
    new = [name for name in now if name not in earlier]
    if new:
        print(f"new, not compared: {', '.join(new)}")
    found = []
    for name, before in earlier.items():
        if name not in now:
            found.append(f"{name}: missing")
            continue
        was, is_ = before["config"], now[name]["config"]
        if ("refused" in was) != ("refused" in is_):
            how = is_.get("refused", "trained").splitlines()[0]
            found.append(f"{name}: was {before['unit']}, is {now[name]['unit']}: {how}")
        elif "refused" not in was:
            parts = [part for part in ("metrics", "weights") if was[part] != is_[part]]
            if parts:
                found.append(f"{name}: other {' and '.join(parts)}{_first(was['numbers'], is_['numbers'])}")
    return found


def _first(was: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Return the first number with the same name that differs."""
    for name, value in was.items():
        if name in now and now[name] != value:
            return f"; {name} was {value!r}, is {now[name]!r}"
    return ""


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--compare", type=Path, help="a file of --json: name the rows that differ")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shown = CliRunner().invoke(
        next(each for each in entry_points(group="console_scripts") if each.name == "distill").load(),
        ["methods", "--json"],
    )
    methods = [method["name"] for method in json.loads(shown.stdout)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_stores(folder)
        for case, stores, flags in cases(methods):
            if options.quick and case not in QUICK:
                continue
            words = [word for store in STORES[stores] for word in ("--store", str(folder / f"{store}.zarr"))]
            size = WHOLE if stores == "mixed" else SMALL
            rows.append(measure(case, [*STUDENT, *size, *words, *flags], folder))
    cells = [
        [each["id"], f"{each['value']:.9g}", each["config"].get("metrics", each["unit"])[:16],
         each["config"].get("weights", "-")[:16]]
        for each in rows
    ]  # fmt: skip
    print_table("Bits of training", ["case", "last loss", "metrics", "weights"], cells)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    if options.compare is not None:
        found = differences(rows, options.compare, quick=options.quick)
        print("\n".join(found) or f"{len(rows)} rows: none differs from {options.compare}")
        if found:
            sys.exit(1)


if __name__ == "__main__":
    main()
