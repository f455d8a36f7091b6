"""Both commands as a whole: imports and texts of help, completion, dry runs, interruptions, tables."""

import copy
import json
import os
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import click
import pytest
import yaml
from click.shell_completion import BashComplete
from click.testing import CliRunner
from terminals import on_terminal

from coursepack.catalog import names_of, read_catalog
from coursepack.config import start_paths
from coursepack.console import print_table
from coursepack.data.store import load_manifest
from coursepack.distill.cli import SUBCOMMANDS as OF_DISTILL
from coursepack.distill.cli import main as distill
from coursepack.distill.cli.catalog import make_catalog
from coursepack.distill.methods import METHODS
from coursepack.distill.recipe import TrainRecipe
from coursepack.distill.runs.compare import EXTRAS, Group, table_rows
from coursepack.errors import nearest
from coursepack.precompute.cli import SUBCOMMANDS as OF_PRECOMPUTE
from coursepack.precompute.cli import executing
from coursepack.precompute.cli import main as precompute
from coursepack.precompute.executors import EXECUTORS

GROUPS = {"distill": distill, "precompute": precompute}
ROWS = [(distill, *row) for row in OF_DISTILL.items()] + [(precompute, *row) for row in OF_PRECOMPUTE.items()]
HEAVY = {"torch", "numpy", "zarr", "pydantic", "numba", "rich", "yaml"}
LIGHT = """
import sys
from importlib import import_module

try:
    import_module(f"coursepack.{sys.argv[1]}.cli").main(sys.argv[2:])
finally:
    print(*sys.modules, sep="\\n", file=sys.stderr)
"""
TRAIN = ("train", "--student", "digits-small", "--source", "digits", "--view", "digits", "--epochs", 3)


def call(group, *words):
    return CliRunner().invoke(group, [str(word) for word in words])


# Help


@pytest.mark.parametrize("words", ["--help", "-h", "--version", "trian", ""])
@pytest.mark.parametrize("name", GROUPS)
def test_help_imports_no_heavy_library(name, words):
    command = [sys.executable, "-c", LIGHT, name, *words.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    modules = set(result.stderr.split())
    assert {"click", f"coursepack.{name}.cli"} <= modules
    assert not modules & HEAVY


def test_a_mistyped_method_imports_no_heavy_library():
    command = [sys.executable, "-c", LIGHT, "distill", "train", "--method", "kdd", "--out", "run"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "unknown method 'kdd'. Did you mean 'kd'?" in result.stderr
    assert not set(result.stderr.split()) & HEAVY


HELP_OF_ALL = """
import sys
from importlib import import_module

heavy = set(sys.argv[1].split(","))
for name in ("distill", "precompute"):
    cli = import_module(f"coursepack.{name}.cli")
    for command in cli.SUBCOMMANDS:
        try:
            cli.main([command, "--help"])
        except SystemExit as end:
            assert end.code == 0
        assert not heavy & set(sys.modules), (name, command, heavy & set(sys.modules))
"""


def test_help_of_every_subcommand_imports_no_heavy_library():
    command = [sys.executable, "-c", HELP_OF_ALL, ",".join(HEAVY)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: ") == len(ROWS)


def test_the_catalog_has_the_names_and_the_options_of_the_tables():
    assert read_catalog() == make_catalog(), "run `python -m coursepack.distill.cli.catalog`"
    assert tuple(METHODS) == names_of("method")
    assert tuple(EXECUTORS) == executing.NAMES


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_version(group):
    result = call(group, "--version")
    assert (result.exit_code, result.stdout) == (0, f"coursepack {version('coursepack')}\n")


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_call_without_arguments_shows_the_help_with_first_steps(group):
    result, steps = call(group), group.epilog.splitlines()[2:]
    assert result.exit_code == 2
    assert result.stderr == call(group, "--help").stdout
    assert len(steps) >= 3
    for step in steps:
        assert f"{step}\n" in result.stderr
        program, name, *words = shlex.split(step)
        GROUPS[program].commands[name].make_context(name, words)


@pytest.mark.parametrize(("group", "name", "row"), ROWS, ids=[name for _, name, _ in ROWS])
def test_help_of_a_subcommand(group, name, row):
    assert group.commands[name].name == name
    shown = call(group, name, "--help").stdout
    assert shown == call(group, name, "-h").stdout
    assert row.help == " ".join(group.commands[name].help.split("\n\n")[0].split())
    assert row.help in " ".join(call(group, "-h").stdout.split())


@pytest.mark.parametrize(("group", "name"), [(distill, "train"), (precompute, "run"), (precompute, "plan")])
def test_options_are_shown_in_groups(group, name):
    command = group.commands[name]
    named = [each for names in command.groups.values() for each in names]
    options = {param.name: param.opts[0] for param in command.params if isinstance(param, click.Option)}
    assert len(set(named)) == len(named)
    assert set(options) <= set(named)
    shown = call(group, name, "--help").stdout
    for title, names in command.groups.items():
        section = shown.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        for each in names:
            assert each not in options or f"\n  {options[each]}" in f"\n{section}"


@pytest.mark.parametrize(
    ("group", "name", "missing"),
    [(distill, "train", "--out"), (distill, "sweep", "GRID_FILE"), (precompute, "status", "--store")],
)
def test_a_subcommand_without_arguments_shows_its_examples(group, name, missing):
    result = call(group, name)
    assert result.exit_code == 2
    assert missing in result.stderr
    for line in group.commands[name].epilog.splitlines()[2:]:
        assert f"{line}\n" in result.stderr
    some = call(group, name, "--device", "cpu") if name == "train" else None
    assert some is None or "Example" not in some.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [("tr", {"train"}), ("", set(OF_DISTILL)), ("train --optim", {"--optimizer"}), ("--ver", {"--version"})],
)
def test_completion(words, expected):
    *args, incomplete = words.split(" ")
    complete = BashComplete(distill, {}, "distill", "_DISTILL_COMPLETE")
    assert {item.value for item in complete.get_completions(args, incomplete)} == expected


def test_completion_of_a_subcommands_name_imports_no_heavy_library():
    code = (
        "import sys; from coursepack.distill.cli import main\ntry:\n main()\nfinally:\n print(*sys.modules)"
    )
    words = {"_DISTILL_COMPLETE": "bash_complete", "COMP_WORDS": "distill ", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'distill'\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **words})
    assert "plain,train" in result.stdout
    assert not set(result.stdout.split()) & HEAVY


def test_help_of_compare_explains_every_column():
    group = Group("kd", {0: 0.5}, {0: 1.0}, {0: 1}, 1.0, None, 0, dict.fromkeys(EXTRAS, 0.5), {})
    header, _ = table_rows([group])
    shown = call(distill, "compare", "--help").stdout.partition("Columns:\n")[2]
    assert all(f"    {name}  " in shown for name in header)
    assert max(map(len, shown.splitlines())) <= 80


# JSON and quiet


@pytest.mark.parametrize(("group", "name", "row"), ROWS, ids=[name for _, name, _ in ROWS])
def test_every_subcommand_prints_json_and_is_quiet(group, name, row):
    options = {option for param in group.commands[name].params for option in param.opts}
    assert {"--json", "--quiet"} <= options


def test_results_of_training_as_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (*TRAIN, "--limit", 50, "--json", "--quiet")
    dry = call(distill, *words, "--dry-run")
    assert dry.stderr == ""
    assert json.loads(dry.stdout)["recipe"]["limit"] == 50
    assert "3 epochs of 1 steps, 3 steps in all" in json.loads(dry.stdout)["notes"]
    done = call(distill, *words, "--out", "run")
    assert (done.exit_code, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["run"], result["epochs"], result["source"]) == ("run", 3, "digits:test")
    assert result["accuracy"] == json.loads(call(distill, "eval", "run", "--json").stdout)["accuracy"]
    shown = call(distill, "report", "run", "--json", "--no-evaluate")
    assert shown.exit_code == 0, shown.output
    page = json.loads(shown.stdout)
    assert (page["page"], page["bytes"]) == ("report.html", (tmp_path / "report.html").stat().st_size)


def test_only_a_quiet_command_prints_no_messages(tmp_path):
    words = (*TRAIN, "--limit", 50, "--out")
    assert call(distill, *words, tmp_path / "a", "--quiet").stderr == ""
    said = call(distill, *words, tmp_path / "b").stderr
    assert "sgd with learning rate 0.05 (constant), batch size 64, evaluated on digits:test" in said
    assert "train b: 150 of 150 samples" in said
    refused = call(distill, *words, tmp_path / "a", "--quiet")
    assert refused.stderr.startswith("Error: ")


def test_results_of_stage_one_as_json(tmp_path, teachers, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--teacher", f"run:{teachers[0]}", "--source", "digits:test", "--view", "digits", "--views", 2)
    plan = json.loads(call(precompute, "plan", *words, "--store", "s.zarr", "--json").stdout)
    assert (plan["rows"], plan["arrays"][0]["name"]) == (710, "logits")
    written = call(precompute, "run", *words, "--store", "s.zarr", "--json", "--quiet")
    assert (written.exit_code, written.stderr) == (0, "")
    (store,) = json.loads(written.stdout)
    assert store == json.loads(call(precompute, "status", "--store", "s.zarr", "--json").stdout)
    assert store["committed_views"] == [0, 1]
    drawn = call(precompute, "inspect", "s.zarr", "--out", "grid.png", "--json")
    assert json.loads(drawn.stdout) == {"picture": "grid.png", "stores": ["s.zarr"]}


def test_compare_shows_the_accuracy_of_teachers(tmp_path, stores):
    words = ("train", "--student", "digits-small", "--store", stores[0], "--epochs", 1, "--limit", 50)
    assert call(distill, *words, "--out", tmp_path / "kd").exit_code == 0
    shown = call(distill, "compare", tmp_path / "kd")
    accuracy = load_manifest(stores[0]).totals["correct"] / (3 * 1442)
    assert f"{accuracy:.2%}" in shown.stdout
    assert "3 views of digits:train" in shown.stdout
    assert shown.stderr == "columns: see distill compare --help\n"
    (group,) = json.loads(call(distill, "compare", tmp_path / "kd", "--json").stdout)
    assert group["teachers"] == {str(stores[0].resolve()): pytest.approx(accuracy)}
    provenance = tmp_path / "kd" / "provenance.json"
    fingerprint = load_manifest(stores[0]).fingerprint
    provenance.write_text(provenance.read_text().replace(fingerprint, "0" * 64))
    assert "views of" not in call(distill, "compare", tmp_path / "kd").stdout, "the store is another one"


# Suggestions


@pytest.mark.parametrize(
    ("group", "words", "text"),
    [
        (distill, ("trian",), "No such command 'trian'. Did you mean 'train'?\n"),
        (distill, ("foo",), "No such command 'foo'.\n"),
        (distill, ("train", "--optimiser", "sgd"),
         "No such option '--optimiser'. Did you mean '--optimizer'?\n"),
        (distill, ("train", "--foo"), "No such option '--foo'.\n"),
        (distill, ("train", "--no-smoke"), "No such option '--no-smoke'. Did you mean '--smoke'?\n"),
        (distill, ("train", "--optimizer", "adm"),
         "'adm' is not one of 'sgd', 'adamw'. Did you mean 'adamw'?"),
        (distill, ("train", "--optimizer", "foo"), "'foo' is not one of 'sgd', 'adamw'.\n"),
        (distill, ("methods", "--needs", "featuers"), "Did you mean 'features'?"),
        (precompute, ("run", "--precision", "bfloat"), "Did you mean 'bfloat16'?"),
        (precompute, ("run", "--executor", "rya"), "Did you mean 'ray'?"),
    ],
)  # fmt: skip
def test_mistyped_words_of_a_command_line(group, words, text):
    result = call(group, *words)
    assert result.exit_code == 2
    assert text in result.stderr


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("foo", ["uniform"], None),
        ("mean", ["map", "margin", "gram"], None),
        ("KD", ["kd", "ka-ps"], "kd"),
        ("label_refinery", ["label-refinery"], "label-refinery"),
        ("dlm", ["dml", "kd"], "dml"),
        ("wieghts", ["weights"], "weights"),
        ("rotation", ["reduction"], None),
    ],
)
def test_suggestions_are_near(name, known, near):
    assert nearest(name, known) == near


# Dry runs and interruptions


def test_dry_run(tmp_path, stores, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (*TRAIN, "--store", stores[0], "--limit", 100, "--batch-size", 30, "--dry-run")
    result = call(distill, *words)
    assert result.exit_code == 0, result.output
    recipe = TrainRecipe.model_validate(yaml.safe_load(result.stdout))
    assert (recipe.method, recipe.limit, recipe.stores) == ("kd", 100, (str(stores[0]),))
    comments = [line for line in result.stdout.splitlines() if line.startswith("#")]
    text = "\n".join(comments)
    assert "sgd with learning rate 0.05 (constant), batch size 30, temperature 4, evaluated on" in text
    assert "3 epochs of 4 steps, 12 steps in all" in text
    assert "logits, 40 bytes a sample, 4.0 kB per epoch" in text
    assert "4.0 kB per epoch, 12.0 kB in 3 epochs" in text
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_the_run_would_refuse(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    result = call(distill, *TRAIN, "--dry-run", "--out", tmp_path / "notes")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is not empty and not a run" in result.stderr
    assert call(distill, *TRAIN, "--dry-run", "--student-size", 9).exit_code == 1


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("coursepack.distill.runs.student.evaluate", interrupt)
    result = call(distill, *TRAIN, "--limit", 50, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        f"interrupted: the same command with --resume continues {tmp_path / 'run'}"
    )
    monkeypatch.undo()
    assert call(distill, *TRAIN, "--limit", 50, "--out", tmp_path / "run", "--resume").exit_code == 0


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path, monkeypatch):
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "base: {student: digits-small, source: digits, view: digits, epochs: 1, limit: 50}\n"
        "grid: {seed: [0, 1, 2]}\n"
    )
    module = import_module("coursepack.distill.runs.sweep")
    monkeypatch.setattr(module, "SHORT_SECONDS", 0)
    train_group, calls = module._train_group, []

    def second_is_interrupted(*arguments):
        calls.append(arguments)
        return interrupt() if len(calls) == 2 else train_group(*arguments)

    monkeypatch.setattr(module, "_train_group", second_is_interrupted)
    words = ("sweep", grid, "--out", tmp_path / "runs", "--tensorboard")
    stopped = call(distill, *words)
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines()[-1] == (
        "interrupted with 1 of 3 students finished: the same command with --resume continues "
        f"{tmp_path / 'runs'}"
    )
    assert [line for line in stopped.stderr.splitlines() if line.startswith("student ")] == [
        "student 1 of 3: seed=0",
        "student 2 of 3: seed=1",
    ]
    done = call(distill, *words, "--resume")
    assert done.exit_code == 0, done.output
    assert "student 3 of 3: seed=2" in done.stderr
    assert "sweep runs: 3 of 3 students" in done.stderr
    assert len(list(tmp_path.glob("runs/*/tensorboard/*"))) == 3


# Tables and colors


LABEL = "kd digits-small from mlp, cnn, resnet limit=300"
HEADER = [
    "recipe",
    "runs",
    "accuracy",
    "+- sd",
    "nll",
    "epoch",
    "beats first",
    "ece",
    "agrees",
    "kl to teachers",
]
CELLS = ["10", "95.30%", "0.71%", "0.152", "1234.5 ms", "10 of 10", "0.012", "0.913", "0.120"]


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        (HEADER, [[LABEL, *CELLS], ["supervised digits-small", *CELLS]]),
        (["", ""], [["teacher", "run:" + "folder/" * 20 + "best.safetensors"]]),
        (["array", "in all"], [["logits", "2 kB"]]),
    ],
)
def test_tables_fit_a_terminal_of_80_columns(monkeypatch, header, rows):
    text = on_terminal(monkeypatch, 80, lambda: print_table("Title", header, rows))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    together = "".join(character for character in text if character not in "│ \n")
    for row in rows:
        assert row[0].replace(" ", "") in together
        assert all(cell in text or len(header) == 2 for cell in row[1:])
    if len(header) == 2:
        assert rows[0][1].replace(" ", "") in together.replace(rows[0][0], "")


@pytest.mark.parametrize(("columns", "width"), [(None, 80), ("0", 80), ("200", 200), ("60", 60), ("32", 32)])
def test_tables_elsewhere_fit_80_columns_unless_told_otherwise(capsys, monkeypatch, columns, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    print_table("Title", HEADER, [[LABEL, *CELLS], ["supervised digits-small", *CELLS]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(text.count(cell) >= 2 for cell in CELLS)
    assert LABEL in " ".join(text.split()) or columns == "200"
    assert ("│" in text) == (columns == "200")


def test_a_table_that_is_too_wide_becomes_lists(capsys):
    print_table("Title", ["store", "arrays that it reads", "bytes"], [["a.zarr", "features/" * 9, "1,000"]])
    shown = capsys.readouterr().out
    assert [line.rstrip() for line in shown.splitlines()] == [
        "Title",
        "a.zarr",
        f"  arrays that it reads  {'features/' * 6}fe",
        f"{' ' * 24}atures/features/features/",
        "  bytes                 1,000",
    ]


def test_no_colors_where_there_is_no_terminal(capsys):
    print_table("Title", ["recipe", "n"], [["a", "1"]])
    assert "\x1b" not in capsys.readouterr().out


# Paths


def test_relative_paths_of_a_recipe_start_from_its_folder(tmp_path, stores, monkeypatch):
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "mlp.zarr").symlink_to(stores[0])
    (folder / "kd.yaml").write_text("student: digits-small\nstores: [mlp.zarr]\nview: v.yaml\nepochs: 1\n")
    (folder / "v.yaml").write_text("ops: [{op: pad_crop, padding: 1}]\nreference_size: 8\n")
    for where, shown in ((folder, "mlp.zarr"), (tmp_path, "lab/mlp.zarr")):
        monkeypatch.chdir(where)
        result = call(distill, "train", folder.relative_to(where) / "kd.yaml", "--dry-run")
        assert result.exit_code == 0, result.output
        assert yaml.safe_load(result.stdout)["stores"] == [shown]


def test_relative_paths_that_a_recipes_folder_lacks_start_from_the_current_one(tmp_path, stores, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "mlp.zarr").symlink_to(stores[0])
    (tmp_path / "lab" / "kd.yaml").write_text("student: digits-small\nstores: [mlp.zarr]\nepochs: 1\n")
    monkeypatch.chdir(tmp_path)
    result = call(distill, "train", "lab/kd.yaml", "--dry-run")
    assert yaml.safe_load(result.stdout)["stores"] == ["mlp.zarr"]
    (tmp_path / "mlp.zarr").unlink()
    result = call(distill, "train", "lab/kd.yaml", "--dry-run")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no store at 'mlp.zarr'" in result.stderr


def test_paths_of_files_start_from_their_folder(tmp_path):
    (tmp_path / "digits").mkdir()
    for name in ("a.zarr", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "w.pt").write_text("")
    values = {
        "base": {
            "stores": ["a.zarr", "b.zarr", "s3://b/a.zarr", "stage:a"],
            "root": "data",
            "view": "digits",
        },
        "stages": [{"precompute": {"weights": "w.pt", "root": "digits/x", "view": {"ops": []}}}],
        "grid": {"stores": [["a.zarr"], []], "seed": [0]},
        "odd": [{"root": None}, {"view": 3}, {"weights": "x" * 9999}, {"classes": "\0"}, "a.zarr"],
    }
    expected = copy.deepcopy(values)
    expected["base"] |= {
        "stores": [f"{tmp_path}/a.zarr", *values["base"]["stores"][1:]],
        "root": f"{tmp_path}/data",
    }
    expected["stages"][0]["precompute"]["weights"] = f"{tmp_path}/w.pt"
    expected["grid"]["stores"][0] = [f"{tmp_path}/a.zarr"]
    start_paths(values, tmp_path)
    assert values == expected
