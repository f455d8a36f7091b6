"""Sequential and monitored teaching, and annealed logits, against references written from their rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import CPU, loss_inputs, make_recipe
from click.testing import CliRunner
from reference import sequences as ref
from reference.loss import soft_target_loss as reference_loss
from reference.methods import numeric_gradient_of_mean

from coursepack.data import view_recipe
from coursepack.data.store import StoreReader
from coursepack.data.views.mixing import Mix
from coursepack.distill.cli import main as distill
from coursepack.distill.fusion.sequence import SequenceConfig
from coursepack.distill.losses.base import BuildContext, Step
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.setup.requirements import check_needs
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import teachers_of_epoch, train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels

N, C, K = 24, 5, 3


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 2, shape)


STUDENT, TEACHERS, LABELS = drawn(N, C), drawn(K, N, C, seed=1), np.arange(N) % C


def objective_of(method, changes, **context):
    return Objective(resolve_objective(method, changes, "test", classes=C), BuildContext(K, **context))


def value_of(objective, *, epoch=0, labels=None):
    student = torch.from_numpy(STUDENT).requires_grad_()
    targets = Targets([torch.from_numpy(each) for each in TEACHERS])
    labels = torch.from_numpy(LABELS) if labels is None else labels
    return objective(loss_inputs(student, labels, targets, step=Step(epoch))), student


def assert_value(value, student, reference):
    """Loss and gradient of a reference that maps rows of student logits to their losses."""
    assert value.loss.item() == pytest.approx(reference(STUDENT).mean(), rel=1e-5)
    value.loss.backward()
    np.testing.assert_allclose(student.grad, numeric_gradient_of_mean(reference, STUDENT), atol=1e-6)


# Sequence


@pytest.mark.parametrize(
    ("fusion", "phases"),
    [
        ({"epochs": [1, 3, 2]}, [1, 3, 2]),
        ({"epochs": [1, 2, 1], "label_epochs": 2}, [1, 2, 1]),
        ({}, ref.equal_phases(K, 6)),
        ({"label_epochs": 2}, ref.equal_phases(K, 4)),
    ],
)
def test_a_sequence_follows_its_teachers_and_its_temperature(fusion, phases):
    temperature = {"shape": "warmup", "start": 6.0, "end": 1.5, "epochs": 4}
    changes = {"fusion": fusion, "temperature": temperature}
    objective = objective_of("sequence", changes, epochs=6)
    for epoch in range(6):
        weights = ref.sequence_weights(phases, epoch)
        told = np.zeros(K)
        told[list(objective.teachers_read(Step(epoch)))] = 1
        np.testing.assert_array_equal(told, weights)
        assert objective.teachers_of_epoch(epoch) == objective.teachers_read(Step(epoch))

        def reference(student, epoch=epoch, weights=weights):
            return reference_loss(
                student, TEACHERS, LABELS, weights=np.tile(weights, (N, 1)),
                temperature=ref.linear(6.0, 1.5, 4, epoch), soft_weight=0.9, hard_weight=0.1,
            ).loss  # fmt: skip

        value, student = value_of(objective, epoch=epoch)
        assert (value.targets is None) == (not weights.any())
        assert_value(value, student, reference)


def test_an_equal_share_loses_no_epoch():
    for teachers in range(1, 6):
        for epochs in range(teachers, 20):
            ends = SequenceConfig().ends(teachers, epochs)
            lengths = np.diff([0, *ends])
            assert ends[-1] == epochs
            assert 1 <= lengths.min() <= lengths.max() <= lengths.min() + 1


@pytest.mark.parametrize(
    ("method", "terms"),
    [("dkd", {}), ("dist", {}), ("sequence", {"angle": {}}), ("sequence", {"distance": {}})],
)
def test_terms_of_the_teachers_rest_while_labels_are_alone(method, terms):
    fusion = {"name": "sequence", "epochs": [1, 1, 1], "label_epochs": 1}
    objective = objective_of(method, {"fusion": fusion, "terms": terms, "hard_weight": 0.5}, epochs=4)
    value, student = value_of(objective, epoch=3)

    def reference(student):
        return 0.5 * np.array(
            [ref.cross_entropy(row, label) for row, label in zip(student, LABELS, strict=True)]
        )

    assert_value(value, student, reference)
    assert len(value_of(objective, epoch=2)[0].terms) > len(value.terms) or method == "sequence"


@pytest.mark.parametrize(
    ("fields", "fusion", "text"),
    [
        (
            {"epochs": 1}, {},
            r"fusion 'sequence' has 2 teachers, but the run has 1 epoch: give --epochs 2 or more, at least "
            r"one per teacher",
        ),
        (
            {"epochs": 4}, {"label_epochs": 3},
            r"has 2 teachers and 3 epochs on labels alone, but the run has 4 epochs: give --epochs 5 or more",
        ),
        (
            {"epochs": 4}, {"epochs": [3, 2]},
            r"fusion.epochs are \[3, 2\] and fusion.label_epochs is 0, 5 epochs in all, but the run has 4: "
            r"give --epochs 5, or other phases; without fusion.epochs the teachers share the run",
        ),
        ({"epochs": 9}, {"epochs": [3, 2], "label_epochs": 1}, r"6 epochs in all, but the run has 9"),
        ({"epochs": 4}, {"epochs": [4]}, r"fusion.epochs has 1 numbers, expected 2: one per store"),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit_the_run_are_refused(stores, fields, fusion, text):
    with pytest.raises(RecipeError, match=text):
        prepare(make_recipe(stores[:2], method="sequence", objective={"fusion": fusion}, **fields), CPU)


def test_a_sequence_of_two_teachers_over_one_epoch_is_one_line(tmp_path, stores):
    words = ["train", "--student", "digits-small", "--method", "sequence", "--epochs", "1"]
    words += [f"--store={store}" for store in stores[:2]]
    result = CliRunner().invoke(distill, [*words, "--out", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: fusion 'sequence' has 2 teachers, but the run has 1 epoch: ")
    assert not (tmp_path / "o").exists()


def test_a_last_phase_without_labels_is_refused():
    with pytest.raises(RecipeError, match=r"last phase on labels alone, but hard_weight is 0"):
        resolve_objective("sequence", {"hard_weight": 0, "fusion": {"label_epochs": 2}}, "test")
    with pytest.raises(
        RecipeError, match=r"hints need every teacher, but fusion 'sequence' reads one at a time"
    ):
        resolve_objective("sequence", {"terms": {"hint": {}}}, "test")


def test_a_sequence_has_to_know_the_epochs():
    with pytest.raises(RecipeError, match=r"their number is not known: set fusion.epochs, or pass epochs"):
        objective_of("sequence", {})
    assert objective_of("sequence", {"fusion": {"epochs": [1, 1, 1]}}).teachers_read(Step(2)) == (2,)


@pytest.fixture
def opened(monkeypatch):
    """Names of stores that are prefetched, and whose rows are read."""
    seen = {"prefetch": [], "rows": [], "will_need": []}
    for name, found in seen.items():
        real = getattr(StoreReader, name)

        def spied(self, array, view, *args, real=real, found=found):
            found.append(self.name)
            return real(self, array, view, *args)

        monkeypatch.setattr(StoreReader, name, spied)
    return seen


@pytest.mark.parametrize("reading", ["resident", "windowed"])
def test_an_epoch_reads_one_store_and_fetches_the_next_one_ahead(stores, opened, reading):
    fields = {"limit": 96, "epochs": 5, "reading": reading}
    fusion = {"epochs": [2, 2], "label_epochs": 1}
    recipe = make_recipe(stores[:2], method="sequence", objective={"fusion": fusion}, **fields)
    setup = prepare(recipe, CPU)
    state = make_state(setup)
    first, second = (store.stem for store in stores[:2])
    for epoch, (read, ahead) in enumerate(
        [({first}, {first}), ({first}, {second}), ({second}, {second}), ({second}, set()), (set(), set())]
    ):
        for names in opened.values():
            names.clear()
        batches = setup.batches(epoch, 0, lambda turn: teachers_of_epoch([state], turn))
        train_epoch([state], batches, setup.targets, epoch)
        assert set(opened["rows"]) == read
        assert set(opened["prefetch"]) == (ahead if epoch < 4 else set())
        assert set(opened["will_need"]) == (read if reading == "windowed" else set())


def test_best_prefetches_one_store_and_random_all(tapped):
    told = {}
    for method in ("best", "random", "kd"):
        state = make_state(prepare(make_recipe(tapped, method=method), CPU))
        told[method] = teachers_of_epoch([state], 0)
    assert len(told.pop("best")) == 1
    assert told == {"random": None, "kd": None}


def test_metrics_of_a_sequence_name_the_teacher_of_the_epoch(tmp_path, stores):
    fusion = {"epochs": [1, 1], "label_epochs": 1}
    recipe = make_recipe(stores[:2], method="sequence", objective={"fusion": fusion}, limit=96, epochs=3)
    train(recipe, tmp_path / "o", device=CPU)
    lines = load_run(tmp_path / "o").metrics
    assert [line["teachers"]["weight"] for line in lines[:2]] == [[1, 0], [0, 1]]
    assert "teachers" not in lines[2]
    result = CliRunner().invoke(distill, ["compare", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output


# Temperatures over epochs


def test_a_temperature_has_to_stay_above_zero_and_within_the_bounds():
    for start, end in ((0.0, 1.0), (4.0, 0.0)):
        with pytest.raises(RecipeError, match="more than 0"):
            resolve_objective(
                "kd", {"temperature": {"shape": "cosine", "start": start, "end": end, "epochs": 3}}, "test"
            )
    schedule = {"shape": "warmup", "start": 4.0, "end": 1.5, "epochs": 3}
    bounds = {"kind": "cwsm", "lowest": 2.0, "highest": 8.0}
    with pytest.raises(RecipeError, match=r"temperature \(T_0\) is from 1.5 to 4, expected .* \(2 to 8\)"):
        resolve_objective("kd", {"temperature": schedule, "dynamic_temperature": bounds}, "test")


def test_min_norm_takes_gradients_at_the_temperature_of_the_epoch():
    schedule = {"shape": "warmup", "start": 8.0, "end": 2.0, "epochs": 3}
    falling = objective_of("ae-kd", {"temperature": schedule})
    for epoch, temperature in ((0, 8.0), (1, 6.0), (5, 2.0)):
        constant = objective_of("ae-kd", {"temperature": temperature})
        got, want = (value_of(each, epoch=epoch)[0] for each in (falling, constant))
        torch.testing.assert_close(got.weights, want.weights, rtol=0, atol=0)
        torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=0)


# Monitored


@pytest.mark.parametrize("rule", ["right", "better"])
@pytest.mark.parametrize("combine", ["auto", "mixture"])
def test_monitored_weights_and_their_loss(rule, combine):
    objective = objective_of("monitored", {"fusion": {"rule": rule}, "combine": combine})
    value, student = value_of(objective)
    weights = ref.monitored_weights(STUDENT, TEACHERS, LABELS, rule)
    np.testing.assert_allclose(value.weights, weights, rtol=1e-6)
    assert (weights.sum(1) == 0).any()
    assert (weights > 0).sum(1).max() > 1
    assert not value.weights.requires_grad
    combined = "sum" if combine == "auto" else combine

    def reference(student):
        return reference_loss(
            student, TEACHERS, LABELS, weights=weights, temperature=4.0, combine=combined, soft_weight=0.9,
            hard_weight=0.1,
        ).loss  # fmt: skip

    assert_value(value, student, reference)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "mse"])
def test_rows_without_a_teacher_are_trained_on_labels_alone(divergence):
    objective = objective_of("monitored", {"divergence": divergence})
    value, student = value_of(objective)
    value.loss.backward()
    alone = (value.weights == 0).all(1)
    probs = torch.from_numpy(STUDENT).softmax(1)
    expected = 0.1 * (probs - torch.eye(C)[torch.from_numpy(LABELS)]) / N
    np.testing.assert_allclose(student.grad[alone], expected[alone], atol=1e-7)
    assert not np.allclose(student.grad[~alone], expected[~alone], atol=1e-3)


def test_no_teacher_counts_for_a_sample_without_a_label():
    labels = torch.full((N,), -100)
    for rule in ("right", "better"):
        value, _ = value_of(objective_of("monitored", {"fusion": {"rule": rule}}), labels=labels)
        assert not value.weights.any()
        assert value.loss.item() == 0


def test_mixed_labels_are_compared_by_cross_entropy_alone(stores):
    first, second = LABELS, (LABELS + 2) % C
    share = np.random.default_rng(2).uniform(0.1, 0.9, N)
    labels = MixedLabels(*(torch.from_numpy(part) for part in (first, second, share.astype(np.float32))))
    value, _ = value_of(objective_of("monitored", {"fusion": {"rule": "better"}}), labels=labels)
    weights = ref.monitored_weights(STUDENT, TEACHERS, (first, second, share), "better")
    np.testing.assert_allclose(value.weights, weights, rtol=1e-6)
    mixed = view_recipe("digits").model_copy(update={"mix": Mix(mixup_alpha=1.0)})
    text = (
        r"fusion 'monitored' counts teachers that are right \(rule=better takes mixed labels\), but the view "
        r"mixes images: a mixed image has two labels"
    )
    config = resolve_objective("monitored", {}, "test")
    with pytest.raises(RecipeError, match=text):
        check_needs("monitored", config, [StoreReader(store) for store in stores], mixed, None)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"terms": {"dkd": {}}},
            r"terms.dkd compares the student with the mixture of teachers, but with fusion ",
        ),
        ({"terms": {"angle": {}}}, r"'monitored' a sample may have no teacher: choose another fusion"),
        (
            {"combine": "mixture", "divergence": "js"},
            r"divergence 'js' of the mixture is not zero for a sample",
        ),
    ],
)
def test_losses_of_a_mixture_that_may_be_missing_are_refused(changes, text):
    with pytest.raises(RecipeError, match=text):
        resolve_objective("monitored", changes, "test")


# Annealed logits


@pytest.mark.parametrize(("highest", "epochs"), [(10, 30), (4, 4), (3, 7), (5, 2), (1, 3)])
def test_annealed_logits_grow_to_full_size(highest, epochs):
    term = {"highest": highest, "epochs": epochs}
    objective = objective_of(
        "annealing-kd", {"hard_weight": 0.0, "terms": {"annealed_logits": {**term, "weight": 2}}}
    )
    for epoch in range(epochs + 2):
        value, student = value_of(objective, epoch=epoch)

        def reference(student, epoch=epoch):
            return 2 * ref.annealed_error(student, TEACHERS.mean(0), highest, epochs, epoch)

        assert_value(value, student, reference)


def test_annealing_kd_ends_on_labels_alone():
    objective = objective_of("annealing-kd", {})
    assert set(value_of(objective, epoch=29)[0].terms) == {"cross_entropy", "annealed_logits"}
    early, late = (value_of(objective, epoch=epoch)[0].terms for epoch in (29, 30))
    assert early["cross_entropy"] == late["annealed_logits"] == 0
    assert early["annealed_logits"] > 0 < late["cross_entropy"]
