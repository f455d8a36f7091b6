"""The parts of training for a loop of one's own: what they give, and what they refuse."""

import shutil

import pytest
import torch
from builders import make_recipe, write_store
from helpers import random_source, rewrite_manifest

from coursepack.data import batches, epoch_order, open_source, subset, view_recipe
from coursepack.data.store import StoreReader, load_manifest
from coursepack.data.store.shards import shard_checksum, shard_pieces
from coursepack.data.views import PadCrop
from coursepack.distill import Learner, Step, make_objective, make_targets, open_teacher_stores
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.stores import WINDOW_CHUNKS, WINDOW_ROWS
from coursepack.distill.training.optimizer import make_optimizer
from coursepack.errors import RecipeError, StoreDamaged, StoreMismatch, TeacherMismatch, UnknownName
from coursepack.models import Network, Preprocessing, build_network


@pytest.fixture
def course(stores):
    return open_teacher_stores(stores)


def student():
    return build_network("digits-small", 10)


def first_batch(course, targets):
    order = epoch_order(subset(course.source, None), seed=0, epoch=0)
    return next(batches(course.source, course.view, order, views=targets.views[:1], batch_size=64))


def test_the_stores_are_opened_with_what_the_stores_were_written_from(course, stores):
    assert [reader.path for reader in course.readers] == stores
    identity = load_manifest(stores[0]).identity
    assert course.source.fingerprint == identity["source"]["fingerprint"]
    assert course.view == view_recipe("digits")
    given = open_source("digits")
    assert open_teacher_stores(stores, source=given).source is given


def test_stores_that_do_not_fit_are_refused(stores, tmp_path, teachers):
    with pytest.raises(RecipeError, match="no store to learn from"):
        open_teacher_stores([])
    with pytest.raises(StoreMismatch, match="train on the source that the teachers saw"):
        open_teacher_stores(stores, source=random_source(1442))
    with pytest.raises(StoreMismatch, match="Leave the view out"):
        open_teacher_stores(stores, view=view_recipe("none"))
    other = write_store(tmp_path / "other.zarr", teachers[0], view_seed=7)
    with pytest.raises(StoreMismatch, match="do not belong together"):
        open_teacher_stores([stores[0], other])
    rewrite_manifest(other, lambda values: values["class_names"].append("eleventh"))
    with pytest.raises(TeacherMismatch, match="has 11 classes, but source 'digits:train' has 10"):
        open_teacher_stores([other])


@pytest.mark.parametrize("vouched", [False, True])
def test_damaged_labels_are_refused_before_anything_is_read(stores, tmp_path, vouched):
    """Students learn the source's labels; a store whose own are others is not what was written."""
    path = tmp_path / "s.zarr"
    shutil.copytree(stores[0], path)
    if vouched:
        layout = load_manifest(path).tables["labels"].layout
        labels = StoreReader(path).labels()
        labels[[3, 700]] = (labels[[3, 700]] + 1) % 10
        pieces = shard_pieces(labels, layout)
        (path / "labels/c.0").write_bytes(b"".join(map(bytes, pieces)))
        entry = [sum(map(len, pieces)), shard_checksum(pieces)]
        rewrite_manifest(path, lambda values: values["files"].update({"labels/c.0": entry}))
        text = r"has other labels than source 'digits:train' for 2 of 1,442 samples \(3, 700\)"
    else:
        content = bytearray((path / "labels/c.0").read_bytes())
        content[40] ^= 1
        (path / "labels/c.0").write_bytes(content)
        text = r"labels/c\.0' does not match its checksum\. Run `precompute verify"
    with pytest.raises((StoreMismatch, StoreDamaged), match=text):
        open_teacher_stores([stores[1], path])
    with pytest.raises((StoreMismatch, StoreDamaged), match=text):
        prepare(make_recipe([path]), torch.device("cpu"))


def test_a_method_is_checked_against_the_stores(course, stores):
    with pytest.raises(UnknownName, match="Did you mean 'amtml'"):
        make_objective(course, student(), "amtm")
    with pytest.raises(RecipeError, match="temprature"):
        make_objective(course, student(), "kd", {"temprature": 2})
    with pytest.raises(RecipeError, match=r"fusion\.weights has 2 numbers, expected 3"):
        make_objective(course, student(), "kd", {"fusion": {"weights": (0.5, 0.5)}})
    with pytest.raises(RecipeError, match=r"'dml' is for students that learn from each other.*distill train"):
        make_objective(course, student(), "dml")
    with pytest.raises(RecipeError) as refused:
        make_objective(course, student(), "amtml-hints")
    line = str(refused.value).splitlines()[2].strip()
    assert line.startswith("precompute run --teacher run:")
    assert f"--store {stores[0]} --tap " in line


def test_changes_replace_fields_of_the_method(course):
    plain, warm = (
        make_objective(course, student(), "kd", changes) for changes in (None, {"temperature": 2.0})
    )
    assert (plain.config.temperature, warm.config.temperature) == (4.0, 2.0)
    assert warm.config.soft_weight == plain.config.soft_weight == 0.9


def test_targets_are_what_the_objectives_read(tapped):
    course = open_teacher_stores(tapped[1:2])
    methods = {name: make_objective(course, student(), name) for name in ("supervised", "kd", "amtml-hints")}
    hints = make_objective(course, student(), "supervised", {"soft_weight": 0.0, "terms": {"hint": {}}})
    read = {name: make_targets(course, objective).arrays for name, objective in methods.items()}
    both = ["logits", "features/conv2"]
    assert read == {"supervised": [[]], "kd": [["logits"]], "amtml-hints": [both]}
    assert make_targets(course, hints).arrays == [["features/conv2"]]
    assert make_targets(course, methods["kd"], hints, methods["kd"]).arrays == [both]
    targets = make_targets(course, methods["kd"])
    answers = targets.fetch(first_batch(course, targets))
    assert (len(answers.logits), answers.features) == (1, {})


def test_views_are_those_that_every_store_has(stores, tmp_path, teachers):
    # One block per view: view 1 was never reached.
    some = write_store(tmp_path / "p.zarr", teachers[0], views=3, block_rows=1442, order=iter([0, 2]))
    course = open_teacher_stores([some, stores[1]])
    objective = make_objective(course, student(), "kd")
    assert make_targets(course, objective).views == (0, 2)
    assert make_targets(course, objective, views=1).views == (0,)
    with pytest.raises(RecipeError, match="views is 3, but the stores have 2 views in common"):
        make_targets(course, objective, views=3)
    other = write_store(tmp_path / "q.zarr", teachers[1], views=3, block_rows=1442, order=iter([1]))
    course = open_teacher_stores([some, other])
    with pytest.raises(StoreMismatch, match="no committed view in common"):
        make_targets(course, make_objective(course, student(), "kd"))


def test_views_that_have_drifted_are_refused_if_they_are_used(course, monkeypatch):
    objective, real = make_objective(course, student(), "kd"), PadCrop.draw

    def other(self, draws, frame):
        real(self, draws, frame)
        if draws.view == 1:
            frame.boxes[:, 0] += 1

    monkeypatch.setattr(PadCrop, "draw", other)
    with pytest.raises(StoreMismatch, match=r"(?s)view 1, block 0: .* \(allow_drift=True in Python\)"):
        make_targets(course, objective)
    allowed = make_targets(course, objective, allow_drift=True)
    assert (
        allowed.drift[0]
        == "digits-mlp: view 1, block 0: the installed version draws different view parameters"
    )
    assert make_targets(course, objective, views=1).drift == ()


def test_the_way_of_reading_changes_the_order_alone(course):
    objective = make_objective(course, student(), "kd")
    resident = make_targets(course, objective, reading="resident")
    windowed = make_targets(course, objective, reading="windowed")
    assert make_targets(course, objective).readers[0].reading == "resident", "the digits fit into memory"
    assert resident.window is None
    assert windowed.window.chunks >= WINDOW_CHUNKS
    assert windowed.window.rows >= WINDOW_ROWS
    assert windowed.window.chunk_rows == max(reader.chunk_rows(["logits"]) for reader in course.readers)
    batch = first_batch(course, resident)
    for one, other in zip(resident.fetch(batch).logits, windowed.fetch(batch).logits, strict=True):
        assert torch.equal(one.decode(), other.decode())


@pytest.mark.parametrize("method", ["kd", "amtml"])
def test_parameter_groups_are_those_of_the_command(course, stores, method):
    learner = Learner(student(), make_objective(course, student(), method))
    groups = learner.parameter_groups()
    grouped = [id(value) for group in groups for value in group["params"]]
    assert sorted(grouped) == sorted(map(id, learner.parameters()))
    decayed = {id(value) for group in groups if "weight_decay" not in group for value in group["params"]}
    latents = {id(value) for group in learner.objective.parameter_groups() for value in group["params"]}
    assert set(grouped) - decayed == latents
    assert bool(latents) == (method == "amtml")
    command = make_optimizer(learner, make_recipe(stores).optimizer)
    assert [list(map(id, group["params"])) for group in command.param_groups] == [
        list(map(id, group["params"])) for group in groups
    ]


def test_a_network_of_ones_own_learns(course):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    own = Network("mine", module, Preprocessing(size=8, mean=(0.3,), std=(0.37,)), 10)
    learner = Learner(own, make_objective(course, own, "ca-mkd"))
    targets = make_targets(course, learner.objective)
    batch, optimizer = first_batch(course, targets), torch.optim.SGD(learner.parameter_groups(), lr=0.3)
    losses = []
    for number in range(40):
        value = learner(batch, targets.fetch(batch), Step(0, number)).value
        optimizer.zero_grad()
        value.loss.backward()
        optimizer.step()
        losses.append(value.loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_view_of_an_epoch_is_opened_before_the_next_is_prefetched(stores, monkeypatch):
    run = prepare(make_recipe(stores), torch.device("cpu"))
    calls = []
    for verb in ("open", "prefetch"):
        monkeypatch.setattr(run.targets, verb, lambda view, _, verb=verb: calls.append((verb, view)))
    for epoch in (0, 1):
        next(run.batches(epoch))
    assert calls == [("open", 0), ("prefetch", 1), ("open", 1), ("prefetch", 2)]
