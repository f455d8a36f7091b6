"""Sweeps: every student as if trained alone, whatever happens to the others."""

import json
import signal
import sys
from functools import partial

import pytest
import yaml
from builders import CPU
from click.testing import CliRunner
from moments import at_rename, die
from spawned import run

from coursepack.distill.cli import main as distill
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.sweep import read_grid, student_name, sweep
from coursepack.distill.runs.train import train
from coursepack.errors import CoursepackError, RecipeError, RunError, TrainingDiverged


def write_grid(folder, grid, **base):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": base, "grid": grid}))
    return path


@pytest.fixture
def methods_grid(tmp_path, stores):
    """Eight students in two groups of four that see the same batches."""
    grid = {"objective.temperature": [1, 4], "seed": [0, 1], "student": ["digits-small", "digits-cnn"]}
    common = {"stores": [str(store) for store in stores[:2]], "epochs": 2, "limit": 200}
    return write_grid(tmp_path, grid, method="kd", optimizer={"lr": 0.02}, **common)


def assert_same_runs(got, want):
    assert (got / "student.safetensors").read_bytes() == (want / "student.safetensors").read_bytes(), got.name
    assert (got / "best.safetensors").read_bytes() == (want / "best.safetensors").read_bytes(), got.name
    metrics = [[{**line, "seconds": 0} for line in load_run(run).metrics] for run in (got, want)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("together", [1, 3])
def test_each_student_is_as_if_trained_alone(tmp_path, methods_grid, together):
    students = read_grid(methods_grid)
    assert len(students) == 8
    assert sweep(students, tmp_path / "swept", device=CPU, together=together) == {}
    for student in students[1::3]:
        train(student.recipe, tmp_path / "alone" / student.name, device=CPU)
        assert_same_runs(tmp_path / "swept" / student.name, tmp_path / "alone" / student.name)
    assert {path.name for path in (tmp_path / "swept").iterdir()} == {student.name for student in students}


def test_students_of_several_methods_share_batches_and_targets(tmp_path, stores):
    """Some ask one teacher per batch, some want relations, some stop early."""
    grid = {
        "method": ["random", "amtml", "ka-ps"],
        "patience": [1, None],
        "optimizer.name": ["sgd", "adamw"],
    }
    path = write_grid(
        tmp_path, grid, student="digits-small", stores=[str(s) for s in stores], epochs=3, limit=100,
        optimizer={"lr": 0.001},
    )  # fmt: skip
    students = read_grid(path)
    sweep(students, tmp_path / "swept", device=CPU, together=len(students))
    assert len({len(load_run(tmp_path / "swept" / student.name).metrics) for student in students}) > 1
    for student in students:
        train(student.recipe, tmp_path / "alone" / student.name, device=CPU)
        assert_same_runs(tmp_path / "swept" / student.name, tmp_path / "alone" / student.name)


def test_students_of_different_pixels_share_batches(tmp_path, stores):
    grid = {"student_mean": [[0.3], [0.6]], "student_size": [8, 16]}
    path = write_grid(tmp_path, grid, student="digits-resnet", stores=[str(stores[0])], epochs=1, limit=64)
    students = read_grid(path)
    sweep(students, tmp_path / "swept", device=CPU, together=4)
    for student in students:
        train(student.recipe, tmp_path / "alone" / student.name, device=CPU)
        assert_same_runs(tmp_path / "swept" / student.name, tmp_path / "alone" / student.name)
    assert len({(path / "student.safetensors").read_bytes() for path in (tmp_path / "swept").iterdir()}) == 4


def test_pixels_that_no_student_can_take_are_refused_before_the_first(tmp_path, stores):
    grid = {"student_std": [[0.3], [0.0]]}
    path = write_grid(tmp_path, grid, student="digits-small", stores=[str(stores[0])])
    with pytest.raises(RecipeError, match=r"std\.0: expected more than 0, got 0\.0"):
        sweep(read_grid(path), tmp_path / "swept", device=CPU)
    assert not (tmp_path / "swept").exists()


def test_views_are_rendered_once_for_all(tmp_path, methods_grid, monkeypatch):
    students = [student for student in read_grid(methods_grid) if student.recipe.seed == 0]
    asked = []
    module = sys.modules["coursepack.distill.targets.stores"]
    fetch = module.CachedTargets.fetch
    monkeypatch.setattr(
        module.CachedTargets,
        "fetch",
        lambda self, batch, teachers=None: asked.append(batch) or fetch(self, batch, teachers),
    )
    sweep(students, tmp_path / "swept", device=CPU, together=4)
    assert len(students) == 4
    assert len(asked) == 2 * 4, "two epochs of four batches, whatever the number of students"


def test_one_that_diverges_takes_no_other_with_it(tmp_path, stores):
    grid = {"optimizer.lr": [0.05, 1.0e30, 0.02]}
    common = {"student": "digits-small", "stores": [str(stores[0])], "epochs": 2, "limit": 100}
    path = write_grid(tmp_path, grid, **common)
    result = CliRunner().invoke(
        distill, ["sweep", str(path), "--out", str(tmp_path / "o"), "--together", "3"]
    )
    assert result.exit_code == 1
    assert "lr=0.05" in result.stdout
    assert "1 of 3 students diverged: lr=1e+30" in result.stderr
    for name in ("lr=0.05", "lr=0.02"):
        recipe = load_run(tmp_path / "o" / name).recipe
        train(recipe, tmp_path / "alone" / name, device=CPU)
        assert_same_runs(tmp_path / "o" / name, tmp_path / "alone" / name)
    with pytest.raises(RunError, match="is unfinished"):
        load_run(tmp_path / "o" / "lr=1e+30")


def test_students_beside_one_that_diverges_stay_together(tmp_path, stores, monkeypatch):
    """Without a single checkpoint, they go on from where they were; nobody is trained twice."""
    grid = {"optimizer.lr": [0.05, 1.0e9, 0.02]}
    path = write_grid(
        tmp_path, grid, student="digits-small", stores=[str(stores[0])], epochs=3, limit=100
    )  # fmt: skip
    module, groups = sys.modules["coursepack.distill.runs.sweep"], []
    train_together = module.train_together
    monkeypatch.setattr(
        module,
        "train_together",
        lambda run, trainings, **how: groups.append(len(trainings)) or train_together(run, trainings, **how),
    )
    diverged = sweep(read_grid(path), tmp_path / "o", device=CPU, together=3, checkpoint_seconds=1e9)
    assert list(diverged) == ["lr=1000000000.0"]
    assert groups == [3]
    for name in ("lr=0.05", "lr=0.02"):
        assert len(load_run(tmp_path / "o" / name).metrics) == 3


def test_one_that_stops_early_is_kept_at_once(tmp_path, stores, monkeypatch):
    """What others of its group run into later cannot take it away."""
    common = {"student": "digits-small", "stores": [str(stores[0])], "epochs": 4, "limit": 100}
    path = write_grid(tmp_path, {"patience": [1, None]}, **common)
    module = sys.modules["coursepack.distill.runs.student"]

    def never_better(network, source, device, **_):
        if (tmp_path / "o" / "patience=1" / "student.safetensors").is_file():
            raise TrainingDiverged("within a step")
        return {"accuracy": 0.5, "nll": 1.0}

    monkeypatch.setattr(module, "evaluate", never_better)
    found = sweep(read_grid(path), tmp_path / "o", device=CPU, together=2)
    assert found == {"patience=null": "within a step"}
    assert len(load_run(tmp_path / "o" / "patience=1").metrics) == 2


def test_fresh_students_beside_one_that_was_begun_otherwise(tmp_path, stores, monkeypatch):
    """How stores are read is decided when a run begins: another group decides for itself."""
    common = {"student": "digits-small", "stores": [str(stores[0])], "epochs": 2, "limit": 100}
    students = read_grid(write_grid(tmp_path, {"optimizer.lr": [0.05, 0.02]}, **common))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        opening = sys.modules["coursepack.distill.targets.teacher_stores"]
        patched.setattr(opening, "choose_reading", lambda *_: "mapped")
        patched.setattr(sys.modules["coursepack.distill.runs.student"], "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(students[1:], tmp_path / "o", device=CPU, checkpoint_seconds=0)
    assert sweep(students, tmp_path / "o", device=CPU, together=2, resume=True) == {}
    provenances = [
        json.loads((tmp_path / "o" / each.name / "provenance.json").read_text()) for each in students
    ]
    assert [each["stores"][0]["reading"] for each in provenances] == ["resident", "mapped"]


@pytest.mark.integration
def test_a_killed_sweep_goes_on(tmp_path, methods_grid):
    students = read_grid(methods_grid)
    sweep(students, tmp_path / "whole", device=CPU, together=2)
    words = [
        "distill", "sweep", methods_grid, "--out", tmp_path / "killed", "--together", 2, "--resume",
        "--json", "--checkpoint-seconds", 0,
    ]  # fmt: skip
    # Of 64 checkpoints in all: with the first two students, with later ones, with those after them.
    for checkpoint in (5, 20, 20):
        killed = run(*words, before=partial(at_rename, checkpoint, die, "checkpoint.pt"))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert [group["runs"] for group in json.loads(done.stdout)] == [2, 2, 2, 2], "two seeds of each"
    for student in students:
        assert_same_runs(tmp_path / "killed" / student.name, tmp_path / "whole" / student.name)


def test_a_sweep_without_resume_refuses_folders_that_are_there(tmp_path, methods_grid):
    students = read_grid(methods_grid)[:1]
    sweep(students, tmp_path / "o", device=CPU)
    before = (tmp_path / "o" / students[0].name / "student.safetensors").stat().st_mtime_ns
    with pytest.raises(RunError, match="already holds a run"):
        sweep(students, tmp_path / "o", device=CPU)
    assert sweep(students, tmp_path / "o", device=CPU, resume=True) == {}
    assert (tmp_path / "o" / students[0].name / "student.safetensors").stat().st_mtime_ns == before


def test_another_grid_with_the_same_names_is_refused(tmp_path, stores):
    def grid(epochs):
        return read_grid(write_grid(tmp_path, {"seed": [0]}, student="digits-small", stores=[str(stores[0])],
                                    epochs=epochs, limit=50))  # fmt: skip

    sweep(grid(1), tmp_path / "o", device=CPU)
    with pytest.raises(RunError, match=r"cannot be resumed(?s:.)*epochs"):
        sweep(grid(2), tmp_path / "o", device=CPU, resume=True)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"student": "digits-cnn", "seed": 3}, "student=digits-cnn,seed=3"),
        ({"optimizer.schedule.shape": "cosine", "ema": None}, "shape=cosine,ema=null"),
        ({"student": "torchvision:resnet18"}, "student=torchvision-resnet18"),
        ({"optimizer.name": "sgd", "fusion.name": "best"}, "optimizer.name=sgd,fusion.name=best"),
        ({"stores": ["a.zarr", "b.zarr"]}, "stores=a.zarr-b.zarr"),
    ],
)
def test_names_say_what_sets_a_student_apart(settings, name):
    assert student_name(settings) == name


def test_names_of_paths_and_long_ones_stay_apart():
    paths = [{"stores": [f"{folder}/t.zarr"]} for folder in ("a/b", "a-b")]
    assert len({student_name(path) for path in paths}) == 2
    long = [{"view": {"ops": list(range(100)), "last": last}} for last in (1, 2)]
    assert len({student_name(each) for each in long}) == 2
    assert all(len(student_name(each)) < 120 and "/" not in student_name(each) for each in [*paths, *long])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid: {}", "has no values for grid"),
        ("grid: {seed: []}", "has no values for seed"),
        ("grid: {seed: 3}", "grid.seed: expected a list, got 3"),
        ("base: {student: digits-small}", "grid: is missing"),
        ("grid: {seed: [1, 1]}\nbase: {student: digits-small, source: digits, view: digits}",
         "gives 'seed=1' more than once"),
        ("grid: {sead: [1]}\nbase: {student: digits-small, source: digits, view: digits}",
         "sead: unknown key, did you mean 'seed'?"),
        ("grid: {student: [digits-smal]}\nbase: {source: digits, view: digits}", "digits-smal"),
    ],
)  # fmt: skip
def test_grids_that_are_refused(tmp_path, text, said):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(CoursepackError) as error:
        sweep(read_grid(path), tmp_path / "o", device=CPU)
    assert said in str(error.value)
    assert not (tmp_path / "o").exists()
