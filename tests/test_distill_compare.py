"""Runs side by side: grouping, labels, figures by hand, refusals."""

import json
import math
from pathlib import Path

import pytest
from builders import CPU, STUDENT, make_recipe
from click.testing import CliRunner

from coursepack.data import view_recipe
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.compare import compare, plot, table_rows
from coursepack.distill.runs.folder import FinishedRun
from coursepack.distill.runs.train import train
from coursepack.errors import RunError


def make_run(accuracy=0.5, nll=1.0, seconds=(0.1,), path="run", stores=(), **fields):
    """A finished run that never was; only the last epoch's evaluation counts."""
    recipe = make_recipe(**fields).model_copy(update={"stores": tuple(stores)})
    metrics = [
        {"epoch": epoch, "seconds": spent, "evaluation": {"accuracy": 0.01, "nll": 99.0}}
        for epoch, spent in enumerate(seconds)
    ]
    metrics[-1]["evaluation"] = {"accuracy": accuracy, "nll": nll}
    return FinishedRun(Path(path), recipe, metrics)


def labels(*runs):
    return [group.label for group in compare(runs)]


def test_figures_by_hand():
    alone = [
        make_run(0.50, 1.0, (0.1, 0.2, 0.9), seed=0),
        make_run(0.60, 2.0, (0.3, 0.3), seed=1),
        make_run(0.70, 3.0, (0.5,), seed=2),
    ]
    taught = [
        make_run(0.55, 0.5, (0.2,), seed=0, method="kd", stores=["cnn.zarr"]),
        make_run(0.60, 0.7, (0.4,), seed=1, method="kd", stores=["cnn.zarr"]),
        make_run(0.90, 0.9, (0.6,), seed=7, method="kd", stores=["cnn.zarr"]),
    ]
    first, second = compare([alone[0], taught[0], *alone[1:], *taught[1:]])
    assert first.accuracy == {0: 0.5, 1: 0.6, 2: 0.7}
    assert first.mean == pytest.approx(0.6)
    assert first.spread == pytest.approx(0.1)
    assert first.epoch_seconds == pytest.approx(0.3)
    assert first.wins is None
    assert second.mean == pytest.approx((0.55 + 0.60 + 0.90) / 3)
    assert second.spread == pytest.approx(math.sqrt((0.1333**2 + 0.0833**2 + 0.2167**2) / 2), rel=1e-3)
    assert (second.wins, second.paired) == (1, 2), "a tie is no win, and seed 7 has no partner"
    assert second.to_dict() == {
        "label": f"kd {STUDENT} from cnn",
        "runs": 3,
        "accuracy_mean": second.mean,
        "accuracy_sd": second.spread,
        "nll_mean": pytest.approx(0.7),
        "epoch_seconds": 0.4,
        "wins": 1,
        "paired": 2,
        "accuracy": {"0": 0.55, "1": 0.6, "7": 0.9},
    }
    assert compare([alone[0]])[0].to_dict()["accuracy_sd"] is None


def test_runs_that_differ_in_their_seed_alone_are_one_group():
    runs = [make_run(seed=seed, limit=limit) for limit in (300, 100) for seed in (0, 1)]
    groups = compare(runs)
    assert [list(group.accuracy) for group in groups] == [[0, 1], [0, 1]]
    assert [group.label for group in groups] == [
        f"supervised {STUDENT} limit=300",
        f"supervised {STUDENT} limit=100",
    ]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({}, {"epochs": 2}, ("epochs=1", "epochs=2")),
        ({}, {"views": 2}, ("views=null", "views=2")),
        ({}, {"optimizer": {"lr": 0.5}}, ("optimizer.lr=0.05", "optimizer.lr=0.5")),
        ({"view": view_recipe("none", 0)}, {"view": view_recipe("none", 1)}, ("view.seed=0", "view.seed=1")),
    ],
)
def test_labels_say_what_differs(left, right, expected):
    words = [f"supervised {STUDENT} {part}" for part in expected]
    assert labels(make_run(**left), make_run(**right)) == words


def test_labels_of_distilled_groups():
    kd = {"method": "kd"}
    found = labels(
        make_run(view=view_recipe("none")),
        make_run(**kd, stores=["a/cnn.zarr"]),
        make_run(**kd, stores=["a/cnn.zarr", "mlp.zarr"]),
        make_run(**kd, stores=["a/cnn.zarr"], online=True),
        make_run(**kd, stores=["a/cnn.zarr"], objective={"temperature": 2.0}),
        make_run(**kd, stores=["a/cnn.zarr"], objective={"fusion": {"weights": [0.5]}}),
    )
    known = [
        f"supervised {STUDENT}",
        f"kd {STUDENT} from cnn",
        f"kd {STUDENT} from cnn, mlp",
        f"kd {STUDENT} from cnn live",
    ]
    for label, start in zip(found, [*known, known[1], known[1]], strict=True):
        assert label.startswith(start)
    assert "temperature=2.0" in found[4]
    assert "weights=[0.5]" in found[5]
    assert "view" not in " ".join(found), "a store's view goes without saying"
    assert len(set(found)) == 6


def test_a_root_is_named_only_if_it_is_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kd = {"method": "kd", "stores": ["cnn.zarr"]}
    same = labels(make_run(root="images"), make_run(**kd, root=str(tmp_path / "images")))
    assert same == [f"supervised {STUDENT}", f"kd {STUDENT} from cnn"]
    moved = labels(make_run(root="images"), make_run(root="others"))
    assert moved == [f"supervised {STUDENT} root=images", f"supervised {STUDENT} root=others"]


def test_stores_of_one_name_are_told_apart_by_their_paths():
    found = labels(make_run(method="kd", stores=["a/cnn.zarr"]), make_run(method="kd", stores=["b/cnn.zarr"]))
    assert found == [f"kd {STUDENT} from a/cnn.zarr", f"kd {STUDENT} from b/cnn.zarr"]


def test_refusals():
    with pytest.raises(RunError, match="nothing to compare: name at least one run"):
        compare([])
    twice = [make_run(path=name, seed=3) for name in ("one", "two")]
    with pytest.raises(RunError, match="have the same recipe and seed, keep one of each: one, two"):
        compare([*twice, make_run(path="three", seed=4)])
    apart = [make_run(evaluation=f"digits:{split}") for split in ("train", "test")]
    with pytest.raises(RunError, match="evaluated on different data: digits:test, digits:train"):
        compare(apart)


def test_table():
    groups = compare(
        [
            make_run(0.5, 1.25, (0.0124,), seed=0),
            make_run(0.75, 1.5, (0.0124,), seed=0, epochs=2),
            make_run(0.25, 0.5, (0.02,), seed=1, epochs=2),
        ]
    )
    header, rows = table_rows(groups)
    assert header == ["recipe", "runs", "accuracy", "+- sd", "nll", "epoch", "beats first"]
    assert rows == [
        [f"supervised {STUDENT} epochs=1", "1", "50.00%", "-", "1.250", "12.4 ms", "-"],
        [f"supervised {STUDENT} epochs=2", "2", "50.00%", "35.36%", "1.000", "16.2 ms", "1 of 1"],
    ]


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for seed in (0, 1):
        train(make_recipe(limit=50, seed=seed), Path(f"a-{seed}"), device=CPU)
    train(make_recipe(limit=50, optimizer={"lr": 0.01}), Path("b-0"), device=CPU)
    shown = CliRunner().invoke(distill, ["compare", "a-0", "a-1", "b-0"])
    assert shown.exit_code == 0
    for cell in ("beats first", f"supervised {STUDENT} optimizer.lr=0.05", "optimizer.lr=0.01", " of 1 "):
        assert cell in shown.stdout
    for cell in ("ece", "agrees"):
        assert (cell in shown.stdout) == (cell == "ece"), "columns that no run has are left out"
    drawn = CliRunner().invoke(distill, ["compare", "a-0", "a-1", "b-0", "--plot", "p.png"])
    assert drawn.exit_code == 0, drawn.output
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(distill, ["compare", "a-0", "--plot", "p.nothing"])
    assert "cannot write a plot to 'p.nothing'" in refused.stderr
    told = json.loads(CliRunner().invoke(distill, ["compare", "a-0", "a-1", "b-0", "--json"]).stdout)
    assert [(group["runs"], group["paired"]) for group in told] == [(2, 2), (1, 1)]


def curve_run(evaluated, epochs, **fields):
    """A run of so many epochs that was evaluated after some: accuracy by epoch."""
    metrics = [
        {"epoch": epoch, "seconds": 0.1}
        | ({"evaluation": {"accuracy": evaluated[epoch + 1], "nll": 1.0}} if epoch + 1 in evaluated else {})
        for epoch in range(epochs)
    ]
    return FinishedRun(Path("run"), make_recipe(**fields), metrics)


def test_curves_of_runs_that_were_not_evaluated_every_epoch(monkeypatch, tmp_path):
    runs = [
        curve_run({2: 0.1, 4: 0.3, 5: 0.5}, 5, seed=0),
        curve_run({2: 0.3, 4: 0.4}, 4, seed=1),  # it stopped early
        curve_run({1: 0.7}, 1, seed=0, limit=50),
    ]
    first, second = compare(runs)
    assert first.curve == {2: pytest.approx(0.2), 4: pytest.approx(0.35)}
    assert first.epochs == {0: 5, 1: 4}
    assert first.accuracy == {0: 0.5, 1: 0.4}
    assert second.curve == {1: 0.7}
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, _path: drawn.append(figure))
    plot([first, second], tmp_path / "p.png")
    axes = drawn[0].axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[2, pytest.approx(20)], [4, pytest.approx(35)]]
    assert axes.collections[0].get_offsets().tolist() == [[5, 50], [4, 40]]
