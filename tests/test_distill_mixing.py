"""Students of mixed images, and of several views per load: from stores, from live teachers, alone."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from builders import CPU, STUDENT, make_recipe
from click.testing import CliRunner
from helpers import make_job

from coursepack.data import Batch, ViewRecipe
from coursepack.data.views import GRID, draw
from coursepack.data.views.erasing import RandomErasing
from coursepack.data.views.geometry import HorizontalFlip, PadCrop
from coursepack.data.views.mixing import Mix
from coursepack.data.views.params import CUTMIX, MIXUP, NO_MIX
from coursepack.distill.cli import main
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels
from coursepack.models.record import METRICS_FILE
from coursepack.precompute import run_job

MIXED = ViewRecipe(
    ops=(PadCrop(padding=1), HorizontalFlip(), RandomErasing(probability=0.5)),
    mix=Mix(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.9),
    reference_size=8,
    seed=4,
)
SINGLE_RANK = {"method": "supervised", "view": MIXED.model_dump(mode="json")}
STILL = {"optimizer": {"lr": 1e-12}}


@pytest.fixture(scope="module")
def mixed_stores(tmp_path_factory, teachers):
    """Float32 stores of two teachers under two mixed views, written in batches of 256."""
    folder = tmp_path_factory.mktemp("mixed")
    paths = [folder / f"{teacher.name}.zarr" for teacher in teachers[:2]]
    for path, teacher in zip(paths, teachers, strict=False):
        run_job(make_job(path, teacher, recipe=MIXED, encoding="float32", batch_size=256))
    return paths


def command(*words):
    return CliRunner().invoke(main, ["train", *map(str, words)])


def step_losses(run, steps):
    """The loss of each of a fresh student's first steps."""
    state, losses = make_state(run), []
    stream = itertools.chain.from_iterable(run.batches(epoch) for epoch in itertools.count())
    for batch in itertools.islice(stream, steps):
        output = state.learner(batch, run.targets.fetch(batch))
        state.optimizer.zero_grad()
        output.value.loss.backward()
        state.optimizer.step()
        losses.append(output.value.loss.item())
    return np.array(losses)


def shares_of(source, batch):
    """First and second labels and the share of the first, float64, of a batch of one view."""
    mixing = draw(MIXED, source, batch.samples, int(batch.views[0])).mixing
    return source.labels[batch.samples], source.labels[mixing.partners], mixing.shares / GRID


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mixed_cross_entropy(logits, first, second, share):
    """`-(share log q[first] + (1 - share) log q[second])`, `(N,)` float64."""
    log_probs, rows = log_softmax(logits.double().numpy()), np.arange(len(first))
    return -(share * log_probs[rows, first] + (1 - share) * log_probs[rows, second])


def test_targets_from_a_cache_are_those_of_live_teachers(mixed_stores):
    fields = {"batch_size": 37}
    cached = prepare(make_recipe(mixed_stores, **fields), CPU)
    live = prepare(make_recipe(mixed_stores, online=True, **fields), CPU)
    kinds, worst = [], 0.0
    for epoch in range(2):
        for batch in cached.batches(epoch):
            kinds.append(batch.params.mixing.kinds)
            pairs = zip(cached.targets.fetch(batch).logits, live.targets.fetch(batch).logits, strict=True)
            for stored, asked in pairs:
                error = (stored.decode() - asked).abs().max() / asked.abs().max()
                worst = max(worst, float(error))
    assert worst <= 1e-5
    counts = np.bincount(np.concatenate(kinds), minlength=3)
    assert counts.sum() == 2 * 1442
    assert min(counts[[NO_MIX, MIXUP, CUTMIX]]) > 100, "every kind is among them"


def test_a_student_of_mixed_views_loses_the_same_from_cache_and_live(mixed_stores):
    fields = {"batch_size": 48, "objective": {"hard_weight": 0.5}}
    cached = step_losses(prepare(make_recipe(mixed_stores, **fields), CPU), 50)
    live = step_losses(prepare(make_recipe(mixed_stores, online=True, **fields), CPU), 50)
    np.testing.assert_allclose(cached, live, rtol=0, atol=1e-5)
    assert cached[-5:].mean() < 0.8 * cached[:5].mean(), "nothing was learned, so equality says little"


def test_mixed_cross_entropy_is_its_formula(mixed_stores):
    """Alone, and as the hard part of the fused loss: the difference of two hard weights."""
    alone = prepare(make_recipe(**SINGLE_RANK, batch_size=200), CPU)
    batch = next(alone.batches(0))
    learner = make_state(alone).learner
    output = learner(batch, None)
    labels = shares_of(alone.source, batch)
    want = mixed_cross_entropy(output.student_logits.detach(), *labels).mean()
    assert output.value.loss.item() == pytest.approx(want, rel=1e-6)
    assert list(output.value.terms) == ["cross_entropy"]
    wrong = mixed_cross_entropy(output.student_logits.detach(), labels[0], labels[1], 1 - labels[2]).mean()
    assert abs(wrong - want) > 1e-3

    losses = []
    for weight in (0.0, 0.7):
        recipe = make_recipe(mixed_stores, objective={"hard_weight": weight}, batch_size=200)
        run = prepare(recipe, CPU)
        output = make_state(run).learner(batch, run.targets.fetch(batch))
        losses.append(output.value.loss.item())
    assert losses[1] - losses[0] == pytest.approx(0.7 * want, abs=2e-5)


def test_accuracy_counts_the_label_of_the_larger_share():
    run = prepare(make_recipe(**SINGLE_RANK, **STILL), CPU)
    state = make_state(run)
    metrics = train_epoch([state], run.batches(0), None)[0]
    main, first_only = 0, 0
    for batch in run.batches(0):
        top = state.learner.logits(batch).argmax(1).numpy()
        first, second, share = shares_of(run.source, batch)
        main += int((top == np.where(share >= 0.5, first, second)).sum())
        first_only += int((top == first).sum())
    assert metrics["accuracy"] == pytest.approx(main / 1442)
    assert main != first_only


def test_few_labels_and_mixed_images_need_a_loss_without_labels(mixed_stores, tmp_path):
    text = r"limit is 100, but the view mixes in samples of the whole split, whose labels would be learned"
    for recipe in (make_recipe(mixed_stores, limit=100), make_recipe(**SINGLE_RANK, limit=100)):
        with pytest.raises(RecipeError, match=text):
            prepare(recipe, CPU)
    words = ["--student", STUDENT, "--store", mixed_stores[0], "--limit", 100, "--epochs", 1]
    refused = command(*words, "--out", tmp_path / "run")
    assert (refused.exit_code, "give --hard-weight 0, a view" in refused.stderr) == (1, True)
    assert not (tmp_path / "run").exists()
    allowed = command(*words, "--hard-weight", 0, "--out", tmp_path / "run")
    assert allowed.exit_code == 0, allowed.output

    run = prepare(make_recipe(mixed_stores, limit=100, objective={"hard_weight": 0}), CPU)
    seen = list(run.batches(0))
    assert np.array_equal(np.sort(np.concatenate([batch.samples for batch in seen])), run.samples)
    partners = np.concatenate([batch.params.mixing.partners for batch in seen])
    assert not np.isin(partners, run.samples).all(), "partners are of the whole split all the same"
    with_limit, whole = (np.sort(run.samples), np.arange(1442))
    for samples in (with_limit, whole):
        rows = Batch(run.source, MIXED, samples, np.zeros_like(samples)).params.mixing.partners
        assert (
            rows[np.searchsorted(samples, with_limit[7])]
            == partners[np.flatnonzero(np.concatenate([batch.samples for batch in seen]) == with_limit[7])[0]]
        ), "and the same"


def test_few_labels_and_mixed_images_need_terms_and_a_fusion_without_labels(mixed_stores):
    """Whatever declares that it reads labels, with or without cross-entropy."""
    fields = {"limit": 100, "view": SINGLE_RANK["view"]}
    virtual = {"terms": {"virtual_teacher": {}}}
    for stores, method, objective in (
        (mixed_stores, "ca-mkd", {"hard_weight": 0}),
        (mixed_stores, "kd", {"hard_weight": 0, **virtual}),
        ((), "tf-kd", {"hard_weight": 0}),
    ):
        text = "whose labels would be learned too: give a method that reads no labels, a view without mix"
        with pytest.raises(RecipeError, match=text):
            prepare(make_recipe(stores, method=method, objective=objective, **fields), CPU)
    for method in ("label-refinery", "meal"):
        assert prepare(make_recipe(mixed_stores, method=method, **fields), CPU).targets is not None
    smoothed = {"hard_weight": 0, "label_smoothing": 0.1}
    assert prepare(make_recipe(mixed_stores, objective=smoothed, **fields), CPU).targets is not None


@pytest.mark.parametrize("adjustment", ["shift", "smooth"])
def test_adjustments_of_wrong_teachers_are_refused_for_mixed_labels(
    stores, mixed_stores, tmp_path, adjustment
):
    objective = {"adjustment": adjustment}
    text = f"adjustment is '{adjustment}', but the view mixes images: a mixed image has two labels"
    with pytest.raises(RecipeError, match=text):
        prepare(make_recipe(mixed_stores, objective=objective), CPU)
    words = ["--student", STUDENT, "--store", mixed_stores[0], "--set", f"objective.adjustment={adjustment}"]
    refused = command(*words, "--out", tmp_path / "run")
    assert (refused.exit_code, "Traceback" in refused.output) == (1, False)
    assert text in refused.stderr
    assert not (tmp_path / "run").exists()
    assert prepare(make_recipe(stores, objective=objective), CPU).targets is not None
    unused = prepare(make_recipe(**SINGLE_RANK, objective=objective), CPU)
    assert isinstance(next(unused.batches(0)).labels, MixedLabels)


# ---- several views per load


def test_views_per_load_trains_on_all_views_in_turn(stores, tmp_path):
    words = ["--student", STUDENT, "--epochs", 4, "--limit", 60, "--batch-size", 16]
    for store in stores[:2]:
        words += ["--store", store]
    result = command(*words, "--views-per-load", 2, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert (
        "3 views in turn, 2 of every sample per epoch, all seen again in the same order after 2 epochs"
        in result.stderr
    )
    lines = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["view"] for line in lines] == [[0, 1], [2, 0], [1, 2], [0, 1]]


@pytest.mark.parametrize("each", [2, 3])
def test_a_batch_holds_each_of_its_samples_under_all_views_of_the_load(stores, each):
    run = prepare(make_recipe(stores[:1], views_per_load=each, batch_size=32), CPU)
    for epoch in (0, 1):
        views, seen = run.views_of_epoch(epoch), []
        for batch in run.batches(epoch):
            assert len(batch) <= 32
            pairs = list(zip(batch.samples.tolist(), batch.views.tolist(), strict=True))
            distinct = list(dict.fromkeys(batch.samples.tolist()))
            assert sorted(pairs) == sorted(itertools.product(distinct, views))
            seen += pairs
        assert sorted(seen) == sorted(itertools.product(range(1442), views))
    batch = next(run.batches(0))
    rows = run.targets.fetch(batch).logits[0].decode()
    for place in range(len(batch)):
        sample = batch.samples[place : place + 1]
        alone = run.readers[0].components("logits", int(batch.views[place]), sample)["values"]
        assert np.array_equal(rows[place], alone[0])


def test_several_views_per_load_lose_the_same_from_cache_and_live(mixed_stores):
    fields = {"views_per_load": 2, "batch_size": 30}
    cached = step_losses(prepare(make_recipe(mixed_stores, **fields), CPU), 20)
    live = step_losses(prepare(make_recipe(mixed_stores, online=True, **fields), CPU), 20)
    np.testing.assert_allclose(cached, live, rtol=0, atol=1e-5)


def test_more_views_than_a_batch_holds_are_refused(stores, tmp_path):
    text = "views_per_load is 3, but batch_size is 2: a batch has to hold every view of at least one sample"
    with pytest.raises(RecipeError, match=text):
        prepare(make_recipe(stores, views_per_load=3, batch_size=2), CPU)
    words = ["--student", STUDENT, "--store", stores[0], "--views-per-load", 3, "--batch-size", 2]
    refused = command(*words, "--out", tmp_path / "run")
    assert (refused.exit_code, text in refused.stderr) == (1, True)
    assert not (tmp_path / "run").exists()
    prepare(make_recipe(stores, views_per_load=3, batch_size=3), CPU)


def test_metrics_of_several_views_are_means_over_rows(stores):
    run = prepare(make_recipe(stores[:1], views_per_load=2, batch_size=50, limit=60, **STILL), CPU)
    state = make_state(run)
    metrics = train_epoch([state], run.batches(0), run.targets)[0]
    correct = torch.cat([state.learner.logits(batch).argmax(1) == batch.labels for batch in run.batches(0)])
    assert len(correct) == 120
    assert metrics["accuracy"] == pytest.approx(float(correct.double().mean()))
