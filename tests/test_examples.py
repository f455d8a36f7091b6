"""Whatever help, pages and examples show, runs: the commands in help texts, README and docs, and the demo."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import click
import pytest
from benchmark_rows import check_rows
from builders import write_store, write_teacher
from click.testing import CliRunner
from spawned import fork_stages, run
from torch.distributed.run import get_args_parser

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


@pytest.mark.integration
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
    fork_stages(monkeypatch)
    for name in ("mlp", "resnet"):
        write_store(Path(f"{name}.zarr"), write_teacher(Path("teachers", name), f"digits-{name}"), views=8)
    Path("grid.yaml").write_text(
        "base: {stores: [cnn.zarr, mlp.zarr], student: digits-small, epochs: 1}\ngrid: {seed: [0, 1]}"
    )
    Path("teachers.yaml").write_text(
        "source: digits\nview: digits\nviews: 1\nteachers:\n"
        "  - {teacher: 'run:teachers/mlp', store: a.zarr}\n"
        "  - {teacher: 'run:teachers/resnet', store: b.zarr}\n"
    )
    Path("chain.yaml").write_text(
        "base: {student: digits-small, epochs: 1, limit: 64}\nstages:\n"
        "  - {name: teacher, train: {source: digits, view: digits}}\n"
        "  - {name: targets, precompute: {teacher: stage:teacher, views: 1}}\n"
        "  - {name: student, train: {stores: [stage:targets]}}\n"
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


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder in which the quick demo ran, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run("script", ROOT / "examples" / "demo.py", "--quick")


@pytest.mark.integration
def test_the_demo_runs(demo):
    folder, result = demo
    assert result.returncode == 0, result.stderr
    for text in (
        "Accuracy on the test digits",
        "Time: 3 teachers",
        "epoch from stores",
        "Plot: demo/demo.png.",
    ):
        assert text in result.stdout
    out = folder / "demo"
    assert [path.name for path in folder.iterdir()] == ["demo"]
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


# The commands in README and docs.

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TEST = "extending.md"
"""Its commands need its examples: `test_extending.py` runs them."""
BLOCK = r"^(?: {4}|srun (?:--\S+ )*|exec )((?:distill|precompute|torchrun|python|make) .*?)(?: &| \|\|)?$"
"""An indented line, or one of a batch script."""
SPAN = r"`((?:distill|precompute|python) [^`]*)`"
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]*\b|\.\.\.|^k$")
NEEDS = re.compile(r"#.*\bneeds\b")
"""A comment behind a command that needs more than this package, such as a data set."""
SMALL = {"train": ["--limit", "64"], "run": ["--views", "3"]}
IN_PHASES = {"--keep-checkpoints", "sequence", "pro-kd"}
"""Words of commands that need all of their epochs; others have one."""


def commands_of_pages():
    """Command lines as `(page, line, whether it is a block)`: one in a sentence may be only a part."""
    found = []
    for page in PAGES:
        for block, span in re.findall(f"{BLOCK}|{SPAN}", unbroken(page.read_text()), re.M):
            found.append((page.name, block or " ".join(span.split()), bool(block)))
    return [each for each in found if each[0] != OWN_TEST]


def program_of(line):
    """The program of a command line and its words; of torchrun, those that each rank runs."""
    program, *words = shlex.split(line, comments=True)
    if program == "torchrun":
        chosen = get_args_parser().parse_args(words)
        return chosen.training_script, chosen.training_script_args
    return program, words


def check_options(group, words):
    """Parse a command line with the command's own options, but for values that stand for others."""
    assert words[0] in GROUPS[group].commands, f"{group} has no command {words[0]}"
    command = GROUPS[group].commands[words[0]]
    context = click.Context(command)
    values, rest, given = command.make_parser(context).parse_args(words[1:])
    assert not [word for word in rest if not PLACEHOLDER.search(word)]
    for option in given:
        if not PLACEHOLDER.search(str(values[option.name])):
            option.handle_parse_result(context, values, [])


@pytest.mark.parametrize("line", dict.fromkeys(line for _, line, _ in commands_of_pages()))
def test_commands_of_pages_have_these_options(line):
    program, words = program_of(line)
    if program in GROUPS:
        check_options(program, words)
    elif program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "-c":
        exec(words[1])
    else:
        script = (ROOT / words[0]).read_text() + (ROOT / "benchmarks" / "_harness.py").read_text()
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in script]


def write_images():
    """The images of the tutorial, as its code writes them, but only a few of each class."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)[1]
    exec(code, {})
    for folder in Path("images").glob("*/*"):
        for file in sorted(folder.iterdir())[8:]:
            file.unlink()


@pytest.mark.integration
def test_commands_of_pages_run_in_order(tmp_path, monkeypatch, demo):
    """In one folder, beside what the demo left, at a tiny size; `test_benchmarks.py` runs the benchmarks."""
    shutil.copytree(demo[0] / "demo", tmp_path / "demo")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    fork_stages(monkeypatch)
    grid = re.search(r"```yaml\n(base: .*?)```", (ROOT / "docs" / "training.md").read_text(), re.S)[1]
    Path("grid.yaml").write_text(re.sub(r"epochs: \d+", "epochs: 1, limit: 64", grid))
    chain = re.search(r"```yaml\n(base: .*?)```", (ROOT / "docs" / "chains.md").read_text(), re.S)[1]
    chain = chain.replace("epochs: 30", "epochs: 1, limit: 64").replace("views: 30", "views: 1")
    Path("chain.yaml").write_text(chain)
    write_images()
    ran = 0
    for page, line, is_block in commands_of_pages():
        program, words = program_of(line)
        if not is_block or NEEDS.search(line) or any(PLACEHOLDER.search(word) for word in words):
            continue
        if program in GROUPS:
            words = [path for word in words for path in expanded(word)] + SMALL.get(words[0], [])
            words += ["--epochs", "1"] if words[0] == "train" and not IN_PHASES & set(words) else []
            words += ["--overwrite"] if words[0] == "train" and "--resume" not in words else []
            result = CliRunner().invoke(GROUPS[program], words)
            assert result.exit_code == 0, f"{page}: {line}\n{result.output}"
        elif program == "python" and re.match(r"benchmarks/[^_]", words[0]) is None:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", words)
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        else:
            continue
        ran += 1
    assert ran > 20
