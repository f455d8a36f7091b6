"""Several ranks: real processes that train one student together, as one would; killed, and resumed."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from builders import CPU, PAIRS, make_recipe
from helpers import copy_to
from moments import with_variables
from spawned import (
    drawn,
    fails_on_all,
    fails_on_one,
    free_port,
    on_ranks,
    one_epoch,
    resumed,
    run,
    running,
    talks,
    vanishes,
)

from coursepack.data import view_recipe
from coursepack.data.views.mixing import Mix
from coursepack.distill.distributed import SINGLE_RANK, Ranks, _start_store
from coursepack.distill.methods import METHODS
from coursepack.distill.runs.folder import RunFolder, load_run
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.metrics import EpochMetrics
from coursepack.distill.training.state import make_state
from coursepack.errors import RankLost, RecipeError, RunError

TWO = ["--standalone", "--nproc-per-node", "2"]
DISTILL = Path(sys.executable).with_name("distill")
WHOLE, UNEVEN, SHORT = 128, 133, 131
"""Samples of an epoch whose last batch, of 64, is full, has 5 rows (2 and 3), or has 3 (is not divided)."""


def cases_of(stores, tapped, mapped):
    """Recipes by name: every method, and everything in a step that several ranks could get wrong."""
    pairs = [{"teacher": 1, "tap": "conv2", "layer": "conv1"}]
    mixed = view_recipe("digits").model_copy(update={"mix": Mix(mixup_alpha=1.0)})

    def case(method="kd", *, chosen=stores, **fields):
        fields = {"limit": UNEVEN, "epochs": 40, **fields}
        return make_recipe(chosen, method=method, **fields).model_dump(mode="json")

    def hinted(method, **hints):
        return featured(method, "hint", **hints)

    def related(method):
        # Weights of up to 30,000 would multiply the rounding of sums in another order.
        terms = {key: {"weight": 1.0} for key in METHODS[method].objective.terms}
        if method in PAIRS:
            terms[method]["pairs"] = PAIRS[method]
        return case(method, chosen=tapped, student="digits-cnn", objective={"terms": terms})

    def featured(method, term, chosen=tapped[:2], **changes):
        changes = {"pairs": pairs, **changes}
        return case(method, chosen=chosen, student="digits-cnn", objective={"terms": {term: changes}})

    margins = [{"teacher": 2, "tap": "layer2.0.bn1:margin", "layer": "conv1"}]
    single = {name for name, method in METHODS.items() if method.objective.needs().one_process}
    relations = ("at", "sp", "rkd", "pkt", "cc", "nst", "fsp")
    apart = (
        {"amtml-hints", "reviewkd", "simkd", "fitnets", "vid", "ab", "ofd", "ft", *relations}
        | single
        | {"you17", "ca-mkd-features"}
    )
    taught = {name: method.objective.needs().teachers for name, method in METHODS.items()}
    plain = {name: case(name, chosen=stores if taught[name] else ()) for name in METHODS if name not in apart}
    reviewed = {"terms": {"reviewkd": {"weight": 1.0}}}
    light = {"terms": {"confidence_hint": {"weight": 1.0}}}
    return plain | {
        "you17": case("you17", chosen=tapped),
        "ca-mkd-features": case("ca-mkd-features", chosen=tapped, objective=light),
        "fitnets": featured("fitnets", "hint"),
        "vid": featured("vid", "vid"),
        "ab": featured("ab", "ab"),
        "ofd": featured("ofd", "ofd", chosen=tapped, pairs=margins),
        "ft": featured("ft", "ft"),
        "amtml-hints": hinted("amtml-hints"),
        **{method: related(method) for method in relations},
        "reviewkd": case("reviewkd", chosen=[mapped], student="digits-cnn", objective=reviewed),
        "simkd": case("simkd", chosen=[mapped], student="digits-cnn"),
        "hints alone": hinted("kd", weight=1.0),
        "distance": case(objective={"terms": {"distance": {"weight": 2.0}, "angle": {}}}),
        "own term": {**case("kd"), "with_pairs": True},
        "even": case("amtml", limit=WHOLE),
        "not divided": case("ca-mkd", limit=SHORT),
        "coupled, not divided": case("amtml", limit=SHORT),
        "parts": case("amtml", objective={"terms": {"angle": None}}, accumulate=3),
        "clipped and averaged": case(optimizer={"clip": 0.5, "ema": 0.9}),
        "float16": case(precision="float16"),
        "views together": case(views_per_load=2),
        "mixed": case("supervised", chosen=(), limit=None, view=mixed, batch_size=1000),
        "online": case(online=True),
        "batch statistics": case(student="digits-resnet", optimizer={"ema": 0.9}),
    }


FEW = ("kd", "amtml-hints", "sp", "not divided", "parts", "float16", "batch statistics")
"""Cases of the default run."""


@pytest.fixture(scope="module", params=["few", pytest.param("every", marks=pytest.mark.integration)])
def epochs(request, stores, tapped, mapped_store):
    """By case: what one process tells of an epoch, and what each of two ranks does."""
    cases = cases_of(stores, tapped, mapped_store)
    cases = {name: cases[name] for name in (FEW if request.param == "few" else cases)}
    together = on_ranks(2, one_epoch, list(cases.values()))
    for told in together:
        if isinstance(told, BaseException):
            raise told
    alone = one_epoch(SINGLE_RANK, list(cases.values()))
    return dict(zip(cases, zip(alone, *together, strict=True), strict=True))


def assert_close(got, want, where, atol=1e-5):
    """Nested numbers agree."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for name in want:
            assert_close(got[name], want[name], (*where, name), atol)
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for place, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            assert_close(ours, theirs, (*where, place), atol)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol, err_msg=str(where))


def test_every_method_has_a_case(stores, tapped, mapped_store):
    single = {name for name, method in METHODS.items() if method.objective.needs().one_process}
    assert set(METHODS) - single < set(cases_of(stores, tapped, mapped_store))


def test_ranks_give_the_losses_and_gradients_of_one_process(epochs):
    for name, (alone, *together) in epochs.items():
        if name in ("batch statistics", "simkd", "float16"):  # each rank normalizes its own rows
            continue
        everything = [dict(told) for told in (alone, *together)]
        if name == "parts":  # what is taken from one part in eight is of other rows
            for told in everything:
                told["told"] = {which: told["told"][which] for which in ("loss", "soft_target", "accuracy")}
        for rank in everything[1:]:
            for what in ("told", "gradients", "state", "evaluation"):
                assert_close(rank[what], everything[0][what], (name, what))
        # epochs of 128, 1442, and 133 or 131 samples
        assert len(alone["gradients"]) == {"even": 2, "mixed": 2, "views together": 5}.get(name, 3), name


def test_scaled_gradients_are_updates_of_one_process(epochs):
    alone, *together = epochs["float16"]
    for rank in together:
        assert_close(rank["state"], alone["state"], ("state",), atol=2e-3)
        assert_close(rank["told"]["loss"], alone["told"]["loss"], ("loss",), atol=2e-2)


def test_ranks_stay_the_same_to_the_last_bit(epochs):
    for name, (_, first, second) in epochs.items():
        assert first["told"] == second["told"], name
        assert first["evaluation"] == second["evaluation"], name
        for key, value in first["state"].items():
            assert value.tobytes() == second["state"][key].tobytes(), (name, key)
    alone, first, _ = epochs["batch statistics"]
    statistics = {key for key in first["state"] if "running_mean" in key}
    assert {key.startswith("average.") for key in statistics} == {False, True}
    assert any((alone["state"][key] != first["state"][key]).any() for key in statistics)


def test_each_rank_reads_and_renders_its_own_rows(stores):
    for method, looked_at in (("kd", 32), ("amtml", 64)):
        recipe = make_recipe(stores, method=method, limit=UNEVEN, reading="mapped")
        runs = [prepare(recipe, CPU, Ranks(index, 2)) for index in (0, 1)]
        steps = list(zip(*(run.batches(0) for run in runs), strict=True))
        assert [[len(batch) for batch in step] for step in steps] == [[32, 32], [32, 32], [2, 3]]
        whole = list(prepare(recipe, CPU).batches(0))
        for (first, second), batch in zip(steps, whole, strict=True):
            assert np.concatenate([first.samples, second.samples]).tolist() == batch.samples.tolist()
        rows = make_state(runs[0]).learner.rows_for(steps[0][0])
        assert len(rows) == looked_at, "targets of all rows are read only where they are coupled"
    short = prepare(make_recipe(limit=SHORT), CPU, Ranks(1, 2))
    assert [(len(batch), batch.global_batch is None) for batch in short.batches(0)][1:] == [
        (32, False),
        (3, True),
    ]
    resumed = [batch.samples.tolist() for batch in short.batches(0, 1)]
    assert resumed == [batch.samples.tolist() for batch in short.batches(0)][1:]


def test_what_a_student_draws_differs_between_ranks_and_parts():
    recipe = make_recipe(limit=100, accumulate=2).model_dump(mode="json")
    told = on_ranks(2, drawn, recipe)
    assert [len(each) for each in told] == [4, 4], "two batches of two parts"
    assert len({tuple(values) for each in told for values in each}) == 8
    assert drawn(SINGLE_RANK, recipe)[0] == told[0][0], "one process draws as the first rank begins"


def test_ranks_talk():
    for told in on_ranks(3, talks):
        assert told["gathered"] == [("it", 0), ("it", 1), ("it", 2)]
        assert told["first"] is True
        assert told["summed"] == [3.0, 3.0]
        assert told["buffers"] == talks(SINGLE_RANK)["buffers"]


def test_ranks_meet_in_a_store_that_earlier_ones_have_left(tmp_path):
    """As torchrun keeps it when it starts all again."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 3)
    for start in ("first", "second", "third"):
        with ThreadPoolExecutor(3) as pool:
            corners = [pool.submit(_start_store, store, index, 3) for index in (2, 1, 0)]
        one, two, three = (corner.result() for corner in corners)
        assert not one.check(["left"]), "what earlier ranks left is not seen"
        two.set("left", start)
        assert one.get("left") == three.get("left") == start.encode()


def test_one_rank_tells_an_error_and_the_others_leave():
    silent, loud = on_ranks(2, fails_on_one, 1)
    assert (type(silent), silent.code) == (SystemExit, 1)
    assert (type(loud), str(loud)) == (RunError, "only here")
    both = on_ranks(2, fails_on_all)
    assert sorted(type(error).__name__ for error in both) == ["RunError", "SystemExit"]
    left, gone = on_ranks(2, vanishes, 1)
    assert gone == "gone"
    assert isinstance(left, RankLost)
    assert "rank 0 of 2 cannot reach the others" in str(left)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 3}, "batch_size is 3, but 2 ranks share a batch: give at least 4"),
        ({"method": "amtml", "online": True}, r"relates all samples of a batch \(angle\).* --online out"),
    ],
)
def test_what_ranks_cannot_do_is_refused_before_the_first_step(stores, fields, message):
    with pytest.raises(RecipeError, match=message):
        prepare(make_recipe(stores, **fields), CPU, Ranks(1, 2))
    prepare(make_recipe(stores, **fields), CPU)


def test_an_epoch_can_be_continued_by_fewer_ranks(stores):
    run = prepare(make_recipe(stores, limit=128), CPU)
    logs, states = [EpochMetrics(3), EpochMetrics(3)], []
    state = make_state(run)
    for batch, log in zip(run.batches(0), logs, strict=True):
        log.add(state.learner(batch, run.targets.fetch(batch)), batch)
        states += log.state()
    together, first = EpochMetrics(3), EpochMetrics(3)
    together.restore(states)
    first.restore(states[:1])
    told, halves = together.means(), [log.means() for log in logs]
    assert told["loss"] == pytest.approx(np.mean([half["loss"] for half in halves]))
    assert told["teachers"]["kl"] == pytest.approx(np.mean([half["teachers"]["kl"] for half in halves]))
    assert first.means() == halves[0] != halves[1]


def test_ranks_that_see_different_checkpoints_do_not_begin(tmp_path, stores, monkeypatch):
    recipe, folders = make_recipe(stores[:1], limit=100), [tmp_path / "one", tmp_path / "two"]
    monkeypatch.setattr(RunFolder, "log", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        train(recipe, folders[0], device=CPU, checkpoint_seconds=0)
    monkeypatch.undo()
    assert (folders[0] / "checkpoint.pt").is_file()
    told = on_ranks(2, resumed, recipe.model_dump(mode="json"), folders)
    assert {type(error) for error in told} == {RunError, SystemExit}
    assert "ranks see different checkpoints in" in "".join(map(str, told))
    assert not folders[1].exists()
    first, second = on_ranks(2, resumed, recipe.model_dump(mode="json"), folders[:1] * 2)
    assert first["epoch"] == second["epoch"] == 0
    assert load_run(folders[0]).metrics == [first], "a run of one process is finished by two"


# Through torchrun, as users start it.


@pytest.mark.integration
def test_a_killed_rank_starts_all_again_from_the_checkpoint(tmp_path, stores):
    """Bit by bit the run that nobody killed: batch statistics, averages, coupled rows, learned weights."""
    words = ["train", "--student", "digits-resnet", "--method", "amtml", "--limit", 200, "--epochs", 4]
    words += [word for store in stores for word in ("--store", store)]
    words += ["--ema", 0.9, "--resume", "--checkpoint-seconds", 0, "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(
        "torchrun", *TWO, "--max-restarts", 1, Path(__file__).with_name("dying_rank.py"), *words, killed
    )
    said, complaints = done.stdout, done.stderr
    assert done.returncode == 0, complaints
    last, _ = on_ranks(2, resumed, load_run(killed).recipe.model_dump(mode="json"), [whole] * 2)
    assert last["epoch"] == 3
    assert complaints.count("resuming ") == 1
    # What torchrun logs of the killed process has a time in front.
    assert "\nTraceback" not in complaints
    assert said.count("accuracy") == 1
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in killed.iterdir()} == names
    for name in names - {"metrics.jsonl"}:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    lines = [[{**line, "seconds": 0} for line in load_run(run).metrics] for run in (killed, whole)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4
    assert json.loads((whole / "provenance.json").read_text())["ranks"] == 2


def test_an_error_is_told_once(tmp_path, stores):
    """Here the first rank finds it, and the others wait for the first."""
    held = tmp_path / "held"
    held.mkdir()
    (held / "recipe.yaml").write_text("")
    words = ["train", "--student", "digits-small", "--store", stores[0], "--out", held]
    done = run("torchrun", *TWO, DISTILL, *words)
    said, complaints = done.stdout, done.stderr
    assert done.returncode == 1
    assert said == ""
    assert complaints.count("\nError: ") + complaints.startswith("Error: ") == 1, complaints
    assert complaints.count("already holds a run") == 1, complaints


@pytest.mark.integration
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_students_of_two_nodes_have_the_losses_of_one_process(tmp_path, stores, where, request):
    addresses, variables = stores[:2], {"COURSEPACK_CACHE": str(tmp_path / "cache")}
    if where == "bucket":
        addresses = [copy_to(f"s3://{request.getfixturevalue('bucket')}", store) for store in addresses]
        variables |= request.getfixturevalue("s3_server").environment
    words = ["train", "--student", "digits-small", "--limit", UNEVEN, "--epochs", 2]
    words += ["--out", tmp_path / "two"]
    words += [word for store in addresses for word in ("--store", store)]
    node = ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "tests"]
    node += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1", DISTILL, *words]
    before = partial(with_variables, variables)
    with running(*node, before=before) as (_, first), running(*node, before=before) as (_, second):
        done = [first(), second()]
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert sorted(each.stdout.count("accuracy") for each in done) == [0, 1]
    assert any((tmp_path / "cache").rglob("*.shard")) == (where == "bucket")
    found = load_run(tmp_path / "two")
    assert json.loads((found.path / "provenance.json").read_text())["ranks"] == 2
    local = found.recipe.model_copy(update={"stores": tuple(map(str, stores[:2]))})
    train(local, tmp_path / "one", device=CPU)
    runs = [load_run(tmp_path / name) for name in ("two", "one")]
    lines = [[{**line, "seconds": 0} for line in run.metrics] for run in runs]
    assert len(lines[0]) == 2
    assert_close(*lines, (where,))
