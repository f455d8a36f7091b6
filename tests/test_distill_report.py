"""The report of runs: every section, figures equal to those of `compare`, hostile names, damaged runs."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from builders import CPU, make_recipe
from click.testing import CliRunner
from reported import Page, metrics_line, taught, write_run
from scipy import stats

from coursepack.data import open_source
from coursepack.distill.cli import main as distill
from coursepack.distill.report.build import build_report
from coursepack.distill.report.outcome import paired_interval
from coursepack.distill.report.reading import mean_by_epoch, read_groups
from coursepack.distill.runs.compare import compare, table_rows
from coursepack.distill.runs.folder import load_runs
from coursepack.distill.runs.train import train
from coursepack.distill.training.evaluate import evaluate
from coursepack.models import load_teacher
from coursepack.pages.blocks import Plot, Series
from coursepack.pages.draw import COLORS, draw, style_of
from coursepack.pages.problems import Problems
from coursepack.pages.render import MAX_NUMBERS, numbers

ALL = [
    *("results", "accuracy", "classes", "confusion", "calibration", "teachers", "agreement"),
    *("losses", "cost", "recipes", "provenance"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stores):
    """Finished runs: two seeds without teachers, two seeds from two stores."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(make_recipe(limit=200, epochs=2, seed=seed), folder / f"alone-{seed}", device=CPU)
        recipe = make_recipe(stores[:2], method="ca-mkd", limit=200, epochs=2, seed=seed)
        train(recipe, folder / f"kd-{seed}", device=CPU)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def page(runs):
    html, problems = build_report(runs, CPU)
    assert problems == []
    return Page(html)


def report(paths, **options):
    html, problems = build_report(paths, CPU, **options)
    return Page(html), problems


@pytest.fixture
def undrawn(monkeypatch):
    """Pages whose drawings are empty, for tests of many pages that look at tables."""
    monkeypatch.setattr("coursepack.pages.render.draw", lambda *_: "<svg></svg>")


def test_every_section_is_there(page):
    assert page.sections == ALL
    assert page.html.startswith("<!DOCTYPE html>")
    assert "Report of runs" in page.texts
    assert "4 runs of 2 recipes." in page.texts
    drawn = sum(tag == "figcaption" for tag, _ in page.tags)
    assert drawn == sum(tag == "figure" for tag, _ in page.tags) >= 8


def test_results_are_those_of_compare(page, runs):
    groups = compare([load_runs(run)[0] for run in runs])
    header, rows = table_rows(groups)
    table = page.tables["Results"]
    columns = {
        "recipe": "recipe", "runs": "runs", "accuracy": "accuracy", "± sd": "+- sd", "nll": "nll",
        "beats first": "beats first", "ece": "ece", "agrees": "agrees", "kl to teachers": "kl to teachers",
    }  # fmt: skip
    for ours, theirs in columns.items():
        shown = [row[table[0].index(ours)] for row in table[1:]]
        assert shown == [row[header.index(theirs)] for row in rows], ours
    first, second = groups
    mean, low, high = paired_interval(first.accuracy, second.accuracy)
    assert table[2][4:6] == [f"{100 * mean:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}"]
    assert table[1][4:6] == ["-", "-"]
    assert page.tables["Accuracy of every seed"][1][1:] == [f"{first.accuracy[seed]:.2%}" for seed in (0, 1)]
    curve = page.tables["Accuracy on the evaluation data"]
    assert [row[0] for row in curve] == ["epoch", "1", "2"]
    for column, group in enumerate(groups, start=1):
        assert [row[column] for row in curve[1:]] == [f"{100 * each:.4g}" for each in group.curve.values()]


def test_paired_intervals_are_those_of_a_t_test():
    first, other = {0: 0.5, 1: 0.7, 2: 0.6, 9: 0.1}, {2: 0.65, 1: 0.74, 0: 0.52, 8: 0.9}
    mean, low, high = paired_interval(first, other)
    known = stats.ttest_rel([0.52, 0.74, 0.65], [0.5, 0.7, 0.6]).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean([0.02, 0.04, 0.05]), known.low, known.high))
    assert paired_interval({0: 0.5}, {1: 0.6}) == (None, None, None)


def test_confusions_classes_and_calibration_are_those_of_the_weights(page, runs):
    source = open_source("digits:test")
    label = page.tables["Results"][1][0]
    matrix = page.tables[f"Confusion matrix of {label}"]
    assert matrix[0][1:] == list(source.class_names)
    counts = np.array([[int(cell.replace(",", "")) for cell in row[1:]] for row in matrix[1:]])
    assert (counts.sum(1) == 2 * np.bincount(source.labels)).all(), "two seeds"
    measured = [
        evaluate(load_teacher(f"run:{run}", source.class_names), source, CPU)
        for run in runs
        if run.name.startswith("alone")
    ]
    accuracy = np.mean([each["accuracy"] for each in measured])
    assert np.trace(counts) / counts.sum() == pytest.approx(accuracy)
    by_class = page.tables["Accuracy by class, and its change from the first in percentage points"]
    assert [row[1] for row in by_class[1:]] == [str(each) for each in np.bincount(source.labels)]
    assert [row[2] for row in by_class[1:]] == [f"{counts[c, c] / counts[c].sum():.2%}" for c in range(10)]
    other = page.tables[f"Confusion matrix of {page.tables['Results'][2][0]}"]
    others = np.array([[int(cell.replace(",", "")) for cell in row[1:]] for row in other[1:]])
    gains = 100 * (np.diag(others) / others.sum(1) - np.diag(counts) / counts.sum(1))
    assert [row[3] for row in by_class[1:]] == [f"{gain:+.2f}" for gain in gains]
    assert page.tables["Accuracy by confidence"][1:]


def test_teachers_are_shown_by_name_epoch_and_class(page, runs):
    label = page.tables["Results"][2][0]
    lines = [load_runs(run)[0].metrics[-1]["teachers"] for run in runs if run.name.startswith("kd")]
    weights = page.tables[f"Weights of the teachers of {label}"]
    assert weights[0] == ["epoch", "digits-mlp", "digits-cnn"]
    means = np.mean([line["weight"] for line in lines], axis=0)
    assert weights[2][1:] == [f"{mean:.4g}" for mean in means]
    by_class = page.tables[f"Weight of each teacher by class in the last epoch, {label}"]
    expected = np.mean([line["weight_by_class"] for line in lines], axis=0).T
    assert [row[1:] for row in by_class[1:]] == [[f"{each:.3f}" for each in row] for row in expected]
    final = page.tables[
        "Final student and each teacher at temperature 1, on one stored view of the training data"
    ]
    assert [row[1] for row in final[1:]] == ["digits-mlp", "digits-cnn"]
    assert all(0 <= float(row[2].rstrip("%")) <= 100 and float(row[3]) > 0 for row in final[1:])


def test_agreement_with_each_teacher_by_hand(tmp_path, stores, teachers):
    """A student with its teacher's weights agrees with it always, and its divergence is zero."""
    run = tmp_path / "same"
    train(make_recipe(stores[:2], student="digits-mlp", limit=64), run, device=CPU)
    shutil.copy(teachers[0] / "student.safetensors", run)
    page, problems = report([run])
    assert len(problems) == 1
    assert "weights or data have changed since" in problems[0]
    final = page.tables[
        "Final student and each teacher at temperature 1, on one stored view of the training data"
    ]
    assert final[1][2:4] == ["100.00%", "0.000"]
    assert float(final[2][3]) > 0


def test_recipes_and_provenance(page, runs):
    fields = {row[0]: row[1:] for row in page.tables["Fields in which recipes differ from the first"][1:]}
    assert fields["method"] == ["supervised", "ca-mkd"]
    assert fields["stores[0]"][0] == "-"
    assert "seed" not in fields
    facts = json.loads((runs[-1] / "provenance.json").read_text())
    prints = {row[2]: row[3] for row in page.tables["Fingerprints"][1:]}
    assert prints[facts["source_fingerprint"]] == "4"
    assert prints[facts["stores"][0]["fingerprint"]] == "2"
    assert [row[0] for row in page.tables["Runs"][1:]] == [str(run) for run in runs]
    assert [row[2] for row in page.tables["Runs"][1:]] == ["0", "1", "0", "1"]


def test_the_page_loads_nothing_and_repeats_no_identifier(page):
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert len(page.identifiers) == len(set(page.identifiers))
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "script-src 'unsafe" not in policy
    known = set(page.identifiers)
    targets = re.findall(r'(?:url\(|href=")#([^")]+)', page.html)
    assert targets
    assert set(targets) <= known


def test_accessible_names(page):
    for tag, attributes in page.tags:
        if tag in ("figure", "nav") or attributes.get("role") == "region":
            assert attributes["aria-label"]
        if tag == "svg":
            assert attributes["aria-hidden"] == "true", "its numbers are in a table beside it"
        if tag == "html":
            assert attributes["lang"] == "en"
        if attributes.get("role") == "region":
            assert attributes["tabindex"] == "0", "a region that scrolls is reached by the keyboard"


def luminance(color):
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(left, right):
    low, high = sorted((luminance(left), luminance(right)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_the_light_and_in_the_dark(page):
    """WCAG 2.2: 4.5 for text, 3 for lines of plots."""
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", part))
        for part in re.findall(r":root \{(.*?)\}", page.html, re.S)
    )
    assert light["paper"] != dark["paper"]
    for colors in (light, dark):
        for name in ("ink", "quiet", "accent", "problem", "right", "wrong"):
            assert contrast(colors[name], colors["paper"]) >= 4.5, name
        for color in COLORS:
            assert contrast(color, colors["paper"]) >= 3, color


def test_lines_differ_without_their_colors():
    assert len({style_of(index) for index in range(32)}) == 32
    assert all(style_of(index)[1] != style_of(index + 1)[1] for index in range(7))


HOSTILE = ["<script>alert(1)<", "$\\frac{", "a\"b'c&d", "_hidden {{ 7 * 7 }}", "<style><b>"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(tmp_path, name):
    folder = tmp_path / name
    write_run(folder, [metrics_line(0, 0.5) | taught(0)], stores=["x/" + name + ".zarr", "b.zarr"])
    unfinished = tmp_path / f"{name}2"
    write_run(unfinished, [metrics_line(0, 0.4)], finished=False)
    page, _ = report([folder, unfinished], evaluate=False)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "b" not in {tag for tag, _ in page.tags}
    assert page.tables["Runs"][1][0] == " ".join(str(folder).split())
    assert any(name in cell for table in page.tables.values() for cell in table[0])


def test_a_run_that_is_being_written(tmp_path):
    lines = [metrics_line(0, 0.25), metrics_line(1, 0.5), '{"epoch": 2, "secon']
    run = write_run(tmp_path / "run", lines, finished=False)
    page, problems = report([run])
    assert problems == [
        f"run {str(run)!r} is unfinished: continue it with --resume, or replace it with --overwrite"
    ]
    assert page.sections[0] == "problems"
    assert problems[0] in page.texts
    assert "results" not in page.sections
    curve = page.tables["Accuracy on the evaluation data"]
    assert curve == [["epoch", f"{run} (unfinished, 2 of 3 epochs)"], ["1", "25"], ["2", "50"]]


def test_a_run_before_its_first_epoch(tmp_path):
    run = write_run(tmp_path / "run", [""], finished=False)
    (run / "metrics.jsonl").unlink()
    other = write_run(tmp_path / "other", [metrics_line(0, 0.5)])
    page, problems = report([run, other], evaluate=False)
    assert len(problems) == 1
    assert [row[0] for row in page.tables["Runs"][1:]] == [str(other), str(run)]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json\n", "is not JSON"),
        ('{"epoch": 1, "seconds": NaN}\n', "holds NaN, which JSON cannot represent"),
        ('{"epoch": 1, "seconds": "x"}\n', "is damaged: seconds: expected a number"),
        ("[]\n", "is damaged: it is not a mapping"),
        ("\n", "is not JSON"),
        ("\x00\x80\n", "is not JSON"),
        (json.dumps(metrics_line(1, 0.5) | {"train": {"loss": "x"}}) + "\n", "damaged: train.loss"),
        (json.dumps(metrics_line(1, 7.0)) + "\n", "damaged: evaluation.accuracy"),
        (json.dumps(metrics_line(1, 0.5, teachers={"weight": [[1]]})) + "\n", "damaged: teachers.weight.0"),
        (json.dumps(metrics_line(1, 0.5, temperature=3)) + "\n", "damaged: temperature"),
    ],
)
def test_a_damaged_line_is_shown_and_left_out(tmp_path, line, why):
    run = write_run(tmp_path / "run", [metrics_line(0, 0.25), line, metrics_line(2, 0.75)])
    page, problems = report([run], evaluate=False)
    assert any(why in problem for problem in problems), problems
    assert [row[0] for row in page.tables["Accuracy on the evaluation data"][1:]] == ["1", "3"]
    assert page.tables["Results"][1][2] == "75.00%"


def test_a_run_whose_last_line_is_damaged_is_no_result(tmp_path):
    good = write_run(tmp_path / "good", [metrics_line(0, 0.5)])
    bad = write_run(tmp_path / "bad", [metrics_line(0, 0.25), "gibberish\n"])
    page, problems = report([good, bad], evaluate=False)
    assert any("line 2 of" in problem for problem in problems)
    assert len(page.tables["Results"]) == 2
    assert f"{bad} (damaged, 1 of 2 epochs)" in page.tables["Accuracy on the evaluation data"][0]


def test_ragged_and_foreign_teachers(tmp_path):
    """Lists that do not fit the stores or each other are left out, not a crash."""
    ragged = taught(0)
    ragged["teachers"]["weight_by_class"] = [[0.5, 0.5], [0.5]]
    ragged["teachers"]["wrong"] = [0.5]
    runs = [
        write_run(tmp_path / "a", [metrics_line(0, 0.5) | ragged], stores=["a.zarr", "b.zarr"]),
        write_run(tmp_path / "b", [metrics_line(0, 0.5) | taught(0, 3)], stores=["a.zarr"]),
    ]
    page, _ = report(runs, evaluate=False)
    headers = [table[0] for name, table in page.tables.items() if name.startswith("Weights of")]
    assert headers == [["epoch", "a", "b"], ["epoch", "teacher 0", "teacher 1", "teacher 2"]]
    assert "temperature" in page.sections


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("content", ["[]", "{", '{"stores": 3}'])
def test_damaged_provenance(tmp_path, content):
    run = write_run(tmp_path / "run", [metrics_line(0, 0.5)])
    (run / "provenance.json").write_text(content)
    page, problems = report([run], evaluate=False)
    assert len(problems) == 1
    assert "provenance.json" in problems[0]
    assert page.tables["Runs"][1][3] == "-"


def test_weights_that_cannot_be_loaded(tmp_path):
    runs = [write_run(tmp_path / name, [metrics_line(0, 0.5)], seed=seed) for seed, name in enumerate("ab")]
    (runs[0] / "student.safetensors").write_bytes(b"nothing")
    page, problems = report(runs)
    assert any(problem.startswith(f"run {str(runs[0])!r} was not evaluated: ") for problem in problems)
    assert "confusion" not in page.sections
    assert page.tables["Results"][1][1] == "2"


def test_without_evaluation_nothing_is_loaded(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [metrics_line(0, 0.5)])
    (run / "student.safetensors").write_bytes(b"nothing")
    page, problems = report([run], evaluate=False)
    assert problems == []
    assert not {"classes", "confusion", "calibration"} & set(page.sections)


def test_groups_of_peers_with_their_ensembles(tmp_path, stores):
    run = tmp_path / "peers"
    train(make_recipe(method="dml", limit=64, epochs=1), run, device=CPU)
    page, problems = report([run])
    assert problems == []
    assert [row[0] for row in page.tables["Results"][1:]] == [
        group.label for group in compare(load_runs(run))
    ]
    assert f"{run} (ensemble)" in [row[0] for row in page.tables["Runs"][1:]]
    assert len([name for name in page.tables if name.startswith("Confusion matrix of")]) == 2
    (run / "1" / "metrics.jsonl").write_text("gibberish\n")
    page, problems = report([run])
    assert len(page.tables["Results"]) == 2, "the other student"
    assert any("line 1 of" in problem for problem in problems)


def test_the_same_run_twice_counts_once(tmp_path):
    run = write_run(tmp_path / "run", [metrics_line(0, 0.5)])
    page, _ = report([run, run], evaluate=False)
    assert "1 run of 1 recipe." in page.texts[1]


def test_many_epochs_are_thinned_in_tables():
    line = Series("a", tuple(range(1000)), tuple(range(1000)))
    rows = numbers(Plot("p", "x", "y", (line,))).rows
    assert len(rows) <= MAX_NUMBERS + 1
    assert rows[-1].cells[1].value == 999


def test_means_and_ranges():
    assert mean_by_epoch([{1: 0.25, 2: 0.5}, {2: 1.0}, {}]) == {2: (0.75, 0.5, 1.0)}
    assert mean_by_epoch([]) == {}


def test_identifiers_of_plots_have_their_prefix():
    series = Series("n", (1.0, 2.0), (1.0, 2.0), ((0.0, 1.0), (1.0, 3.0)), 0, 3)
    svg = draw(Plot("t", "epoch", "y", (series,)), "p7")
    names = re.findall(r'\bid="([^"]+)"', svg)
    assert {name for name in names if name.endswith("-group-3")} == {"p7-line0-group-3", "p7-band0-group-3"}
    assert all(name.startswith("p7-") for name in names)
    assert "currentColor" in svg
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", svg)
    assert svg == draw(Plot("t", "epoch", "y", (series,)), "p7"), "the same bytes again"


def test_the_command(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        return CliRunner().invoke(distill, ["report", *map(str, words)])

    result = call(*runs[:2], "--no-evaluate")
    assert result.exit_code == 0, result.output
    size = math.floor((tmp_path / "report.html").stat().st_size / 100) / 10
    assert re.fullmatch(r"report\.html: [\d.]+ kB\n", result.stdout), size
    write_run(tmp_path / "o", [metrics_line(0, 0.5)], finished=False)
    result = call("o", "--out", "p.html")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: run 'o' is unfinished")
    refusals = {
        ("no",): "there is no run to report:\n  there is no run at 'no'.",
        ("o", "--out", "."): "'.' is a folder: choose another --out",
        ("o", "--out", "no/p.html"): "cannot be made, since there is no folder 'no': choose another --out",
    }
    for words, text in refusals.items():
        result = call(*words)
        assert result.exit_code == 1
        assert text in result.stderr
    shutil.copytree(runs[0], "copy")
    result = call(runs[0], "copy")
    assert result.exit_code == 1
    assert "have the same recipe and seed, keep one of each" in result.stderr


def test_a_repeated_label_is_read_once(tmp_path):
    problems = Problems()
    problems.add("x")
    problems.add("x")
    assert problems.texts == ["x"]
    run = write_run(tmp_path / "run", [metrics_line(0, 0.5)])
    assert [group.index for group in read_groups([run, run], problems)] == [0]
