"""Training: what students see and learn, with stores, with live teachers, and alone."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import CPU, loss_inputs, make_recipe, write_store
from reference.methods import calibration_error

from coursepack.data import Batch, open_source
from coursepack.distill.methods import METHODS
from coursepack.distill.objective import Objective
from coursepack.distill.setup.prepare import describe_setup, prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.evaluate import evaluate
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.models import Network, Preprocessing


def step_losses(run, steps, batches=None):
    """The loss of each of a fresh student's first steps."""
    state = make_state(run)
    losses = []
    stream = batches or itertools.chain.from_iterable(run.batches(epoch) for epoch in itertools.count())
    for batch in itertools.islice(stream, steps):
        output = state.learner(batch, None if run.targets is None else run.targets.fetch(batch))
        state.optimizer.zero_grad()
        output.value.loss.backward()
        state.optimizer.step()
        losses.append(output.value.loss.item())
    assert len(losses) == steps
    return np.array(losses)


def weights_of(learner):
    return {name: value.clone() for name, value in learner.state_dict().items()}


def assert_same_weights(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_stores_and_live_teachers_give_the_same_losses(stores):
    cached = step_losses(prepare(make_recipe(stores), CPU), 50)
    live = step_losses(prepare(make_recipe(stores, online=True), CPU), 50)
    np.testing.assert_allclose(cached, live, rtol=0, atol=1e-5)
    assert cached[-1] < 0.7 * cached[0], "nothing was learned, so equality says little"


def test_stores_and_live_teachers_agree_on_batches_that_mix_views(stores):
    cached, live = (prepare(make_recipe(stores, online=online), CPU) for online in (False, True))

    def batches():
        rng = np.random.default_rng(0)
        while True:
            samples, views = rng.integers(0, 1442, 64), rng.integers(0, 3, 64)
            yield Batch(cached.source, cached.recipe.view, samples, views, CPU)

    batch = next(batches())
    assert set(batch.views) == {0, 1, 2}
    for stored, asked in zip(
        cached.targets.fetch(batch).logits, live.targets.fetch(batch).logits, strict=True
    ):
        torch.testing.assert_close(stored.decode(), asked, rtol=1e-5, atol=1e-5)
    for reader, stored in zip(cached.readers, cached.targets.fetch(batch).logits, strict=True):
        for row in (0, 20, 63):
            alone = reader.components("logits", int(batch.views[row]), batch.samples[row : row + 1])["values"]
            assert np.array_equal(stored.decode()[row], alone[0])
    np.testing.assert_allclose(
        step_losses(cached, 50, batches()), step_losses(live, 50, batches()), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("online", [False, True])
def test_targets_can_be_fetched_for_some_teachers(stores, online):
    run = prepare(make_recipe(stores, online=online), CPU)
    batch = next(run.batches(0))
    everyone = [torch.as_tensor(_values(rows)) for rows in run.targets.fetch(batch).logits]
    some = [torch.as_tensor(_values(rows)) for rows in run.targets.fetch(batch, [2, 0]).logits]
    assert len(everyone) == 3
    assert torch.equal(some[0], everyone[2])
    assert torch.equal(some[1], everyone[0])


def _values(rows):
    return rows if isinstance(rows, torch.Tensor) else rows.decode()


def test_limit_takes_the_same_samples_with_and_without_stores(stores):
    plain, distilled = prepare(make_recipe(limit=100), CPU), prepare(make_recipe(stores, limit=100), CPU)
    assert len(plain.samples) == 100
    assert np.array_equal(plain.samples, distilled.samples)
    labels = plain.source.labels[plain.samples]
    assert np.array_equal(np.bincount(labels), np.full(10, 10)), "a subset is even over classes"
    for run in (plain, distilled):
        seen = np.concatenate([batch.samples for batch in run.batches(0)])
        assert np.array_equal(np.sort(seen), plain.samples)
    batch = next(distilled.batches(1))
    rows = distilled.targets.fetch(batch).logits[0].decode()
    stored = distilled.readers[0].components("logits", 1, batch.samples)["values"]
    assert np.array_equal(rows, stored), "a store of everything is read by the source's sample indices"


def test_epochs_take_the_views_of_the_stores_in_turn(stores):
    def views(**fields):
        run = prepare(make_recipe(**fields), CPU)
        seen = [[set(batch.views) for batch in run.batches(epoch)] for epoch in range(5)]
        assert all(batch == set(run.views_of_epoch(epoch)) for epoch in range(5) for batch in seen[epoch])
        return [run.views_of_epoch(epoch) for epoch in range(5)]

    assert views(stores=stores) == [[0], [1], [2], [0], [1]]
    assert views(stores=stores, views=2) == [[0], [1], [0], [1], [0]]
    assert views(views=3) == [[0], [1], [2], [0], [1]]
    assert views(stores=stores, views_per_load=2) == [[0, 1], [2, 0], [1, 2], [0, 1], [2, 0]]
    assert views() == [[0], [1], [2], [3], [4]], "without stores every epoch has a new view"


def test_epochs_shuffle_anew_and_seeds_differ(stores):
    run, other = prepare(make_recipe(stores), CPU), prepare(make_recipe(stores, seed=1), CPU)
    first, again, second, elsewhere = (
        np.concatenate([batch.samples for batch in r.batches(epoch)])
        for r, epoch in ((run, 0), (run, 0), (run, 1), (other, 0))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, elsewhere)
    one, two = make_state(run).learner, make_state(other).learner
    assert not torch.equal(next(one.parameters()), next(two.parameters()))


def test_a_partly_committed_store_trains_on_what_is_committed(tmp_path, stores, teachers):
    # One block per view: views 0 and 2 are done, 1 was never reached.
    partial = write_store(tmp_path / "p.zarr", teachers[0], views=3, block_rows=1442, order=iter([0, 2]))
    run = prepare(make_recipe([partial]), CPU)
    assert run.views == (0, 2)
    assert prepare(make_recipe([partial, stores[1]]), CPU).views == (0, 2)
    assert [run.views_of_epoch(epoch) for epoch in range(3)] == [[0], [2], [0]]
    whole = prepare(make_recipe(stores[:1]), CPU)
    batches = itertools.chain(run.batches(0), run.batches(1))
    np.testing.assert_array_equal(step_losses(run, 46), step_losses(whole, 46, batches))


def test_teacher_weights_choose_between_stores(stores):
    def losses(chosen, weights=None):
        objective = None if weights is None else {"fusion": {"weights": weights}}
        return step_losses(prepare(make_recipe(chosen, objective=objective), CPU), 25)

    first, second = losses(stores[:1]), losses(stores[1:2])
    np.testing.assert_allclose(losses(stores[:2], (1, 0)), first, rtol=1e-6)
    np.testing.assert_allclose(losses(stores[:2], (0, 1)), second, rtol=1e-6)
    np.testing.assert_allclose(losses(stores[:2], (0.5, 0.5)), losses(stores[:2]), rtol=1e-6)
    assert np.abs(first - second).min() > 1e-4
    assert not np.allclose(losses(stores[:2], (0.9, 0.1)), losses(stores[:2]), rtol=1e-4)


def test_learners_on_one_stream_equal_learners_alone(stores):
    run = prepare(make_recipe(stores[:2], limit=200), CPU)
    other = prepare(make_recipe(stores[:2], limit=200, optimizer={"lr": 0.01}, seed=3), CPU)
    together = [make_state(run), make_state(other)]
    metrics = [train_epoch(together, run.batches(epoch), run.targets) for epoch in range(3)]
    for place, maker in enumerate((run, other)):
        alone = make_state(maker)
        for epoch in range(3):
            assert train_epoch([alone], run.batches(epoch), run.targets)[0] == metrics[epoch][place]
        assert_same_weights(weights_of(together[place].learner), weights_of(alone.learner))
    assert metrics[0][0] != metrics[0][1]


def test_metrics_of_an_epoch_are_means_over_samples():
    run = prepare(make_recipe(limit=100, batch_size=64, optimizer={"lr": 1e-12}), CPU)
    state = make_state(run)
    metrics = train_epoch([state], run.batches(0), None)[0]
    logits, labels = zip(
        *((state.learner.logits(batch).detach(), batch.labels) for batch in run.batches(0)), strict=True
    )
    logits, labels = torch.cat(logits), torch.cat(labels)
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert metrics["cross_entropy"] == metrics["loss"]
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_kd_is_hintons_formula():
    rng = np.random.default_rng(0)
    student, teachers = rng.normal(size=(16, 10)) * 3, rng.normal(size=(3, 16, 10)) * 4
    labels = rng.integers(0, 10, 16)
    mixture = np.exp(log_softmax(teachers / 4)).mean(0)
    divergence = (mixture * (np.log(mixture) - log_softmax(student / 4))).sum(1)
    hard = -log_softmax(student)[np.arange(16), labels]
    want = (0.9 * 4**2 * divergence + 0.1 * hard).mean()

    targets = Targets([torch.from_numpy(teacher).float() for teacher in teachers])
    inputs = loss_inputs(torch.from_numpy(student).float(), torch.from_numpy(labels), targets)
    value = Objective(METHODS["kd"].objective)(inputs)
    assert float(value.loss) == pytest.approx(want, rel=1e-5)
    assert {name: float(term) for name, term in value.terms.items()} == {"soft_target": float(value.loss)}


def test_supervised_is_cross_entropy():
    logits, labels = torch.randn(16, 10, generator=torch.manual_seed(0)), torch.arange(16) % 10
    value = Objective(METHODS["supervised"].objective)(loss_inputs(logits, labels))
    assert float(value.loss) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert list(value.terms) == ["cross_entropy"]


class FixedLogits(torch.nn.Module):
    """Answers row i of a table to the i-th image of the source, whatever the batches."""

    def __init__(self, table):
        super().__init__()
        self.table, self.seen = table, 0
        self.modes = set()

    def forward(self, images):
        self.modes.add(self.training)
        start, self.seen = self.seen, self.seen + len(images)
        return self.table[start : self.seen]


@pytest.mark.parametrize("classes", [10, 4])
def test_evaluation_against_numpy(classes):
    source = open_source("digits:train")
    names = tuple(str(name) for name in range(classes))
    object.__setattr__(source, "class_names", names)
    object.__setattr__(source, "labels", source.labels % classes)
    table = np.random.default_rng(0).normal(size=(len(source.labels), classes)).astype(np.float32)
    module = FixedLogits(torch.from_numpy(table))
    network = Network("fixed", module, Preprocessing(size=8, mean=(0.0,), std=(1.0,)), classes)
    facts = evaluate(network, source, CPU)

    rows = np.arange(len(table))
    rank = (table > table[rows, source.labels][:, None]).sum(1)
    want = {
        "accuracy": (rank == 0).mean(),
        "nll": -log_softmax(table.astype(np.float64))[rows, source.labels].mean(),
        "calibration_error": calibration_error(np.exp(log_softmax(table.astype(np.float64))), source.labels),
    }
    if classes > 5:
        want["accuracy_top5"] = (rank < 5).mean()
    assert facts == pytest.approx(want, rel=1e-5)
    assert module.modes == {False}
    assert module.training, "evaluation leaves a network in the mode it was in"


def test_evaluation_does_not_augment():
    source = open_source("digits:test")
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(len(images), 10)

    network = Network("spy", Spy(), Preprocessing(size=8, mean=(0.0,), std=(1.0,)), 10)
    evaluate(network, source, CPU)
    assert np.array_equal(
        (torch.cat(seen) * 255).round().numpy()[:, 0], source.pixels(np.arange(355))[..., 0].astype(float)
    )


def test_shuffled_views_come_once_per_round_in_another_order_each(stores):
    def turns(**fields):
        run = prepare(make_recipe(view_order="shuffled", **fields), CPU)
        return run, [run.views_of_epoch(epoch) for epoch in range(24)]

    run, seen = turns(views=6, epochs=24)
    rounds = [[view for (view,) in seen[start : start + 6]] for start in range(0, 24, 6)]
    assert all(sorted(each) == list(range(6)) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 4
    assert turns(views=6, epochs=24)[1] == seen
    assert turns(views=6, epochs=24, seed=1)[1] != seen
    assert all(set(batch.views) == set(seen[8]) for batch in run.batches(8))
    assert describe_setup(run).endswith(
        "; 6 views in random order, one per epoch, all seen again in another order after 6 epochs"
    )
    assert describe_setup(turns(views=6)[0]).endswith("; 6 views in random order, one per epoch")
    cyclic = prepare(make_recipe(views=6, epochs=24), CPU)
    assert describe_setup(cyclic).endswith(
        "; 6 views in turn, one per epoch, all seen again in the same order after 6 epochs"
    )
    _, seen = turns(views=6, views_per_load=2)
    for start in range(0, 24, 3):
        assert sorted(itertools.chain(*seen[start : start + 3])) == list(range(6))
    stored, _ = turns(stores=stores)
    assert sorted(itertools.chain(*map(stored.views_of_epoch, range(3)))) == [0, 1, 2]


@pytest.mark.parametrize("with_stores", [False, True])
def test_an_epoch_with_a_view_twice_is_refused(stores, with_stores):
    fields = {"stores": stores} if with_stores else {"views": 3}
    with pytest.raises(RecipeError, match="views_per_load is 4, but the run has 3 views: a batch would"):
        prepare(make_recipe(**fields, views_per_load=4), CPU)
    text = "views_per_load is 2, but the run has 3 views in shuffled order.* divides 3, or leave view_order"
    with pytest.raises(RecipeError, match=text):
        prepare(make_recipe(**fields, views_per_load=2, view_order="shuffled"), CPU)
    prepare(make_recipe(**fields, views_per_load=2), CPU)
