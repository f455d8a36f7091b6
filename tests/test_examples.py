"""Whatever help and examples show, runs: the commands in the help texts, the demo."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from benchmark_rows import check_rows
from builders import write_store, write_teacher
from click.testing import CliRunner

from coursepack.distill.cli import main as distill
from coursepack.precompute.cli import main as precompute

ROOT = Path(__file__).parents[1]
GROUPS = {"distill": distill, "precompute": precompute}


def unbroken(text):
    """Text with every command on one line, as a shell reads it."""
    return re.sub(r" \\\n +", " ", text)


def examples():
    """The example lines of every command's help, by command."""
    found = {}
    for group, entry in GROUPS.items():
        for name, command in entry.commands.items():
            lines = [line.strip() for line in unbroken(command.epilog or "").splitlines()]
            assert lines[1:2] in (["Example:"], ["Examples:"]), f"{group} {name} has no example in its help"
            found[f"{group} {name}"] = [line for line in lines[2:] if line]
    return found


def expanded(word):
    """What a shell makes of a word."""
    return sorted(str(path) for path in Path().glob(word)) if "*" in word else [word]


def test_examples_of_the_help_run_in_order(tmp_path, monkeypatch):
    lines = examples()
    assert all(line.startswith(f"{command} ") for command, of in lines.items() for line in of)
    # A teacher is trained, then its store is written, then students are trained, looked at and compared.
    order = [
        lines["distill train"].pop(0),
        *lines.pop("precompute run"),
        *lines.pop("distill train"),
        *(line for of in lines.values() for line in of),
    ]
    assert len(order) >= 9
    monkeypatch.chdir(tmp_path)
    for name in ("mlp", "resnet"):
        write_store(Path(f"{name}.zarr"), write_teacher(Path("teachers", name), f"digits-{name}"), views=8)
    Path("grid.yaml").write_text(
        "base: {stores: [cnn.zarr, mlp.zarr], student: digits-small, epochs: 1}\ngrid: {seed: [0, 1]}"
    )
    for seed in (0, 1):
        words = ["train", "--student", "digits-small", "--source", "digits", "--view", "digits"]
        words += ["--epochs", "1", "--seed", str(seed), "--out", f"runs/alone-{seed}"]
        result = CliRunner().invoke(distill, words)
        assert result.exit_code == 0, result.output
    for line in order:
        command, *words = shlex.split(line)
        words = [path for word in words for path in expanded(word)]
        if words[0] == "train":
            words += ["--epochs", "1", "--overwrite"]
        result = CliRunner().invoke(GROUPS[command], words)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert result.stdout.strip(), line


def test_help_shows_examples_one_per_line():
    for command, lines in examples().items():
        group, name = command.split()
        shown = unbroken(CliRunner().invoke(GROUPS[group], [name, "--help"]).output)
        assert all(f"  {line}\n" in shown for line in lines), command


def test_the_demo_runs(tmp_path):
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "demo.py"), "--quick"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for text in (
        "Accuracy on the test digits",
        "Time: 3 teachers",
        "epoch from stores",
        "Plot: demo/demo.png.",
    ):
        assert text in result.stdout
    out = tmp_path / "demo"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    stores = {"mlp.zarr", "cnn.zarr", "resnet.zarr"}
    assert {path.name for path in out.iterdir()} == stores | {"teachers", "runs", "demo.png", "rows.json"}
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "runs").iterdir())) == 2 * 2 * 2
    identifiers = check_rows(out / "rows.json")
    assert identifiers > {
        "teacher mlp",
        "from stores, lr 0.03",
        "seeds better from stores, lr 0.1",
        "plain epoch",
    }
    shown = [line for line in result.stderr.splitlines() if line.startswith("$ ")]
    assert len(shown) == 3 + 3 + 8
    for line in shown:
        assert shlex.split(line)[1] in GROUPS
