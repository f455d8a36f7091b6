"""Benchmarks run at their tiny size, bars are decided by intervals, and pages show the stored rows."""

import contextlib
import importlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_rows import check_rows
from spawned import run

from coursepack.distill.methods import METHODS
from coursepack.distill.recipe import load_recipe, resolve_objective
from coursepack.distill.setup.resolve import resolve_recipe
from coursepack.models import build_network, parse_tap

FOLDER = Path(__file__).parents[1] / "benchmarks"
RESULTS = sorted((FOLDER / "results").glob("*.json"))
OTHERS = ("render", "method_bits", "structure")
"""Commands that measure nothing against a bar."""
CLUSTER, SERVER = ("scaling",), ("remote",)
"""Those that start a cluster, which `test_precompute_ray.py` runs, and those that start an S3 server."""
ELSEWHERE = OTHERS + CLUSTER + SERVER
BENCHMARKS = sorted(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem not in ELSEWHERE)


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("_harness")


def noise(middle, count, *, seed=0, width=0.05):
    rng = random.Random(seed)
    return [middle + rng.uniform(-width, width) for _ in range(count)]


@pytest.mark.parametrize(
    ("middle", "bar", "holds"),
    [
        (0.9, "<= 1.0", "yes"), (1.1, "<= 1.0", "no"), (1.0, "<= 1.0", "undecided"),
        (1.1, ">= 1.0", "yes"), (0.9, ">= 1.0", "no"), (1.0, ">= 1.0", "undecided"),
    ],
)  # fmt: skip
def test_a_bar_holds_does_not_or_is_undecided(harness, middle, bar, holds):
    row = harness.row("a / b", noise(middle, 40), "ratio", {}, bar)
    assert row["holds"] == holds
    assert row["config"]["interval"] == "95 %"
    assert row["low"] < row["value"] < row["high"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_than_six_rounds_decide_nothing(harness, count):
    assert harness.row("a / b", [0.5] * count, "ratio", {}, "<= 1.0")["holds"] == "undecided"
    seconds = {"a": [0.5] * count, "b": [1.0] * count}
    assert harness.ratio_of_sums("a / b", seconds, "a", "b", {}, "<= 1.0")["holds"] == "undecided"
    assert harness.exact("size", 0.5, "MB", {}, "<= 1.0")["holds"] == "yes"


def test_the_interval_has_the_median_19_times_in_20(harness):
    missed = 0
    for seed in range(400):
        row = harness.row("a", noise(1.0, 15, seed=seed, width=0.5), "ratio", {}, "<= 9")
        missed += not row["low"] <= 1.0 <= row["high"]
    assert missed <= 30


def test_rounds_are_added_until_a_bar_is_decided(harness, monkeypatch):
    monkeypatch.setattr(harness, "STARTED", harness.time.monotonic())
    rng = random.Random(1)

    def rows_of(seconds):
        return [harness.row("a / b", harness.ratios(seconds, "a", "b"), "ratio", {}, "<= 1.0")]

    def measured(middle, **options):
        variants = {"a": lambda: rng.uniform(middle - 0.3, middle + 0.3), "b": lambda: 1.0}
        return harness.measure(variants, 6, rows_of, **options)[0]

    close, far = measured(0.93), measured(0.4)
    assert (close["holds"], far["holds"]) == ("yes", "yes")
    assert far["n"] == 6 < close["n"] <= 6 * 2**harness.DOUBLINGS
    assert measured(1.0)["n"] == 6 * 2**harness.DOUBLINGS
    assert measured(1.0, patience=0)["n"] == 6
    monkeypatch.setattr(harness, "STARTED", harness.time.monotonic() - harness.LATEST)
    assert measured(1.0)["n"] == 6


def test_variants_take_turns_in_changing_order_after_a_warm_up(harness):
    order = []
    seconds = harness.alternate({name: lambda name=name: order.append(name) for name in "abc"}, 20)
    assert [len(values) for values in seconds.values()] == [20] * 3
    rounds = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == 21
    assert {frozenset(names) for names in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 3


def test_only_a_bar_that_does_not_hold_fails(harness, tmp_path, capsys):
    def report(*middles):
        rows = [
            harness.row(f"a / {k}", noise(middle, 40), "ratio", {}, "<= 1.0")
            for k, middle in enumerate(middles)
        ]
        harness.report("title", rows, tmp_path / "rows.json")

    report(0.9, 1.0)
    with pytest.raises(SystemExit) as failed:
        report(0.9, 1.1)
    assert failed.value.code == 1
    assert check_rows(tmp_path / "rows.json") == {"a / 0", "a / 1"}
    assert "undecided" in capsys.readouterr().out


def test_there_are_benchmarks():
    names = "allocator classes epoch fidelity gpu loss memory methods peers precompute reproduce sequences "
    assert (names + "simulation sources store train views").split() == BENCHMARKS


COMMANDS = {name: name for name in BENCHMARKS} | {"gpu": "gpu --device cpu"}
SECTIONS = ("methods --section cost", "views --section students", "views --section training")
FEW = ("epoch", "memory", "simulation")
"""Commands that the default tests run; the others take seconds each."""
RUNS = [
    pytest.param(command, marks=() if command in FEW else pytest.mark.integration)
    for command in (*COMMANDS.values(), *SECTIONS, *SERVER)
]


def run_script(words, **_):
    """`subprocess.run` of a script, in a process that imports nothing again."""
    assert words[0] == sys.executable
    done = run("script", *words[1:])
    done.check_returncode()
    return done


@pytest.mark.parametrize("command", RUNS)
def test_benchmarks_run(command, harness, tmp_path, monkeypatch, capsys):
    rows, (name, *flags) = tmp_path / "rows.json", command.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, "--quick", "--json", str(rows)])
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    if hasattr(module, "subprocess"):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run_script))
    # A bar that does not hold at the tiny size is no news.
    with contextlib.suppress(SystemExit):
        module.main()
    shown = capsys.readouterr().out
    assert all(identifier.split()[0] in shown for identifier in check_rows(rows))
    assert list(tmp_path.iterdir()) == [rows]


def reproduced(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, words)])
    importlib.import_module("reproduce").main()


@pytest.mark.integration
def test_finished_students_are_kept_when_a_method_is_added(harness, tmp_path, monkeypatch):
    def rows(*methods):
        out, file = tmp_path / "out", tmp_path / "rows.json"
        reproduced(monkeypatch, "--quick", "--seeds", 1, "--out", out, "--json", file, "--methods", *methods)
        trained = {path: path.stat().st_mtime_ns for path in out.rglob("student.safetensors")}
        return trained, {row["id"]: row for row in json.loads(file.read_text())["rows"]}

    trained, first = rows("kd")
    more, second = rows("kd", "at")
    assert trained.items() < more.items()
    assert first.items() < second.items()
    assert second.keys() - first.keys() == {"resnet56/resnet20/at"}


@pytest.mark.parametrize("words", [(), ("--root", "nowhere")], ids=["no root", "no folder"])
def test_without_data_one_line_says_where_files_are_expected(harness, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        reproduced(monkeypatch, *words)
    assert "cifar-100-python with train, test and meta" in refused.value.code
    assert "\n" not in refused.value.code
    assert not list(tmp_path.iterdir())


def test_methods_without_a_published_figure_are_refused(harness, tmp_path, monkeypatch):
    words = ("--quick", "--pairs", "vgg13/vgg8", "--methods", "ab", "dist", "--out", tmp_path)
    with pytest.raises(SystemExit, match="no published figure of ab, dist for vgg13/vgg8"):
        reproduced(monkeypatch, *words)


def test_reproduced_methods_name_layers_of_their_networks(harness):
    reproduce = importlib.import_module("reproduce")
    names = {spec for pair in reproduce.PAIRS for spec in pair.split("/")}
    layers = {spec: dict(build_network(spec, 100).module.named_modules()) for spec in names}
    for method, figures in reproduce.PUBLISHED.items():
        for pair, figure in zip(reproduce.PAIRS, figures, strict=True):
            if figure is None:
                continue
            teacher, student = pair.split("/")
            each = reproduce.experiment(pair, method, False)
            recipe = resolve_objective(method, each.values.get("objective", {}), pair, classes=100)
            chosen = [one for term in recipe.terms.values() for one in getattr(term, "pairs", ())]
            assert bool(each.store) == (method != "supervised")
            assert {tap.tap for tap in chosen} == set(each.taps)
            for one in chosen:
                assert set(parse_tap(one.tap).layers) <= layers[teacher].keys()
                assert set(one.layer.split("+")) <= layers[student].keys()


def test_published_figures_are_those_of_the_recipes(harness):
    reproduce = importlib.import_module("reproduce")
    for method, figures in reproduce.PUBLISHED.items():
        each = reproduce.experiment("resnet32x4/resnet8x4", method, False)
        pair = f"{each.teacher}/{load_recipe(each.file)['student']}"
        pair = "wrn-40-2/wrn-16-2" if method == "ab" else pair
        if method != "supervised":
            assert f"{figures[reproduce.PAIRS.index(pair)]:.2f}" in each.file.read_text(), method


def test_the_cost_of_a_method_is_of_the_same_targets_from_the_store_and_in_memory(harness, tmp_path):
    cost, place_of = (importlib.import_module(name) for name in ("_methods_cost", "_train_place"))
    place = place_of.Place(tmp_path, 32, ("resnet8",))
    place.write_store("resnet8", tmp_path / "store.zarr", ["layer3:map"])
    recipe = place.recipe("resnet8", "fitnets", 16, stores=[tmp_path / "store.zarr"])
    setup = cost.prepare(recipe, cost.DEVICE)
    held = cost.HeldTargets(setup)
    for batch in setup.batches(cost.EPOCH):
        (rows,), (kept,) = (each.fetch(batch).features.values() for each in (setup.targets, held))
        assert torch.equal(kept, rows.decode())
    assert cost._kind(setup.targets) == "maps"


def test_lines_of_methods_are_of_code_and_reference(harness):
    structure = importlib.import_module("structure")
    lines = structure.method_lines()
    assert lines.keys() == METHODS.keys()
    assert lines["kd"][1] == 0, "the reference of soft targets is not counted"
    called = {f"reference.relations.{name}" for name in ("at", "attention")}
    assert structure._called("reference.relations.at") == called
    rows = {row["id"]: row["value"] for row in structure._method_rows()}
    together = "methods with their references: median of lines"
    assert rows["methods: median of lines"] < rows[together] < 500


def test_a_method_that_refuses_a_pair_has_a_row_that_says_so(harness, tmp_path):
    cost = importlib.import_module("_methods_cost")
    size = replace(cost.QUICK, methods=("fsp", "tf-kd"), students=("wrn-16-2",))
    rows = {row["id"]: row for row in cost.costs(tmp_path, size)}
    assert "flow" in rows["cost: wrn-16-2, fsp, refused"]["config"]["why"]
    assert "cost: wrn-16-2, tf-kd, step / plain" in rows


def test_what_the_store_adds_to_a_step_is_a_share_of_a_plain_step(harness):
    cost = importlib.import_module("_methods_cost")
    seconds = {"plain": [2.0] * 6, "store": [3.0] * 6, "memory": [2.9] * 6}
    rows = {row["id"].rpartition(", ")[2]: row for row in cost._step_rows("kd", seconds, {}, "<= 0.03")}
    assert rows["step / plain"]["value"] == 1.5
    assert rows["step - plain"]["value"] == 1000
    assert rows["step from memory - plain"]["value"] == pytest.approx(900)
    assert rows["(store - memory) / plain"]["value"] == pytest.approx(0.05)
    assert rows["(store - memory) / plain"]["holds"] == "no"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_stored_rows_are_rows(path):
    check_rows(path, converted="note" in json.loads(path.read_text())["machine"])


def test_figures_that_need_cuda_are_left_out_with_a_reason(harness):
    gpu = importlib.import_module("_gpu")
    device = gpu.Device(torch.device("cpu"))
    rows = importlib.import_module("_gpu_loss").losses(device, (4, 10, 2), 1, compiled=False)
    assert "the device is the CPU" in device.missing["loss in CUDA graphs"]
    assert not [row["id"] for row in rows if "graph" in row["id"]]


def test_launches_and_synchronizations_of_a_step_are_counted(harness):
    device = importlib.import_module("_gpu").Device(torch.device("cpu"))
    values = torch.arange(4.0)

    def step():
        for _ in range(2):
            assert float((values * 2)[values > 1].sum()) == 10

    launched, waited = device.launches(step, 2)
    assert waited == 1
    assert launched >= 3


def test_results_that_may_be_missing_have_a_line_in_the_page(harness, tmp_path, monkeypatch):
    tables, render = (importlib.import_module(name) for name in ("_tables", "render"))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "Not run: no GPU was at hand." in render.block("machine of gpu")
    assert not render.block("gpu loss").strip()
    row = {"id": "loss (1,2,3) ours", "value": 5.0, "low": 4.0, "high": 6.0, "unit": "us", "n": 3}
    row |= {"config": {}, "bar": None, "holds": None}
    machine = {"processor": "a", "threads": 1, "device": "cpu", "date": "2026-01-01"}
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": machine, "rows": [row]}))
    assert "2026-01-01" in render.block("machine of gpu")
    assert "5 us" in render.block("gpu loss")


def test_pages_show_the_stored_rows():
    command = [sys.executable, str(FOLDER / "render.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_benchmark_that_was_not_run_has_a_note_in_the_place_of_its_tables(harness, tmp_path, monkeypatch):
    tables, render = (importlib.import_module(name) for name in ("_tables", "render"))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in ("precompute memory", "machine of precompute", "fidelity"):
        assert "Not run yet: there is no `benchmarks/results/" in render.block(name)


def test_every_table_stands_in_a_page(harness):
    tables = importlib.import_module("_tables")
    pages = "".join((FOLDER.parent / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    for name in tables.TABLES:
        assert f"<!-- rows: {name} -->" in pages, name
    for path in RESULTS:
        assert f"<!-- rows: machine of {path.stem} -->" in pages, path.stem


def test_a_changed_row_changes_its_pages(harness, tmp_path, monkeypatch):
    tables, render = (importlib.import_module(name) for name in ("_tables", "render"))
    told = json.loads((FOLDER / "results" / "demo.json").read_text())
    entry = next(row for row in told["rows"] if row["id"] == "epoch from stores / plain")
    entry["value"] = 1.23
    (tmp_path / "demo.json").write_text(json.dumps(told))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in ("demo time", "demo time rows"):
        assert "1.23" in render.block(name)


PEER_ROWS = {
    "dml": "dml, 2",
    "kdcl": "kdcl naive, 2",
    "okddip": "okddip, 4",
    "one": "one, 3",
    "ffl": "ffl, 2",
    "afd": "afd, 2",
    "let": "let",
}
"""Row of the study of peers that each recipe trains."""


@pytest.mark.parametrize("name", PEER_ROWS)
def test_recipes_for_peers_are_rows_of_the_study(harness, name):
    peers = importlib.import_module("peers")
    entry = next(each for each in peers.ENTRIES if each.name == PEER_ROWS[name])
    path = FOLDER.parent / "recipes" / "digits" / f"{name}.yaml"
    recipe = resolve_recipe(load_recipe(path), str(path))
    measured = peers.recipe_of(entry, peers.FULL, 0, [], [Path("runs/let-teacher")])
    assert recipe == measured.model_copy(update={"evaluate_every": 1})
    rows = {row["id"]: row for row in json.loads((FOLDER / "results" / "peers.json").read_text())["rows"]}
    row, ensemble = (rows[f"study: {PEER_ROWS[name]}{what}"] for what in ("", ", ensemble"))
    text = " ".join(path.read_text().replace("#", "").split())
    assert f"{row['value']:.1f} % mean of seeds 0 to 9 for the student (95 % interval " in text
    for each in (row, ensemble):
        assert f"{each['low']:.1f} to {each['high']:.1f}" in text
    assert f"{ensemble['value']:.1f} % for the ensemble" in text
