"""Fusions, temperatures, relations and whole objectives against float64 references, and what they imply."""

import numpy as np
import pytest
import torch
from builders import loss_inputs, made_up_batch
from reference import methods as ref
from reference.loss import soft_target_loss as reference_loss

from coursepack.distill.fusion import FUSIONS
from coursepack.distill.fusion.adaptive import Adaptive
from coursepack.distill.fusion.temperature import fused_logits, sample_temperatures
from coursepack.distill.fusion.weights import confidence_weights, entropy_weights
from coursepack.distill.losses.base import (
    BuildContext,
    FeaturePair,
    Step,
)
from coursepack.distill.losses.relation import angle_loss, distance_loss, student_embedding
from coursepack.distill.methods import METHODS
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.schedule import Schedule
from coursepack.distill.setup.requirements import depth_group
from coursepack.distill.targets.base import Targets
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels, shift_logits, soft_target_loss, teacher_stats
from coursepack.kernels.angles import chunked_angle_loss

N, C, K, D = 8, 5, 3, 4
GOLDEN_STUDENT = torch.tensor([[2, 0.5, -1], [0.1, 0.2, 0]])
GOLDEN_TEACHER = torch.tensor([[3, 0, -1], [-1, 2, 0.5]])


@pytest.fixture
def batch():
    return made_up_batch(N, C, K, D)


def tensors(batch, teachers=None):
    teachers = batch["teachers"] if teachers is None else teachers
    targets = Targets([torch.from_numpy(teacher).float() for teacher in teachers])
    student = torch.from_numpy(batch["student"]).float().requires_grad_()
    return student, torch.from_numpy(batch["labels"]), targets


def context(teachers=K, **fields):
    fields = {"accuracies": (0.5,) * teachers, **fields}
    return BuildContext(teachers=teachers, embedding_width=D, seed=3, epochs=6, **fields)


def value_of(batch, config, teachers=None, step=None):
    student, labels, targets = tensors(batch, teachers)
    embedding = torch.from_numpy(batch["embedding"]).float()
    objective = Objective(config, context(len(targets.logits)))
    return objective(loss_inputs(student, labels, targets, embedding=embedding, step=step)), student


def test_confidence_and_entropy_weights(batch):
    stats = teacher_stats([torch.from_numpy(t) for t in batch["teachers"]], torch.from_numpy(batch["labels"]))
    got = confidence_weights(stats.cross_entropy).numpy()
    np.testing.assert_allclose(
        got, ref.confidence_weights(batch["teachers"], batch["labels"]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        entropy_weights(stats.entropy).numpy(), ref.entropy_weights(batch["teachers"]), rtol=1e-5
    )
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
    assert confidence_weights(stats.cross_entropy[:1]).tolist() == [[1.0]] * N, "one teacher counts whole"
    assert entropy_weights(torch.zeros(3, 2)).allclose(torch.full((2, 3), 1 / 3)), "three sure ones are equal"


def test_adaptive_weights_and_their_gradients(batch):
    fusion = Adaptive(K, D, seed=1).double()
    latents, shared = fusion.latents.detach().numpy(), fusion.shared.detach().numpy()
    student, labels, targets = tensors(batch)
    objective = Objective(METHODS["amtml"].objective, context())
    embedding = torch.from_numpy(batch["embedding"]).float().requires_grad_()
    value = objective(loss_inputs(student, labels, targets, embedding=embedding))
    latents, shared = (p.detach().double().numpy() for p in objective.fusion.parameters())
    want = ref.adaptive_weights(batch["embedding"], latents, shared)
    np.testing.assert_allclose(value.weights.numpy(), want, rtol=1e-4, atol=1e-6)

    def total(embedding, latents, shared):
        weights = ref.adaptive_weights(embedding, latents, shared)
        config = objective.config
        soft = reference_loss(
            batch["student"], batch["teachers"], batch["labels"], weights=weights,
            temperature=5.0, soft_weight=config.soft_weight, hard_weight=config.hard_weight,
        )  # fmt: skip
        return soft.loss.mean() + 0.1 * ((latents**2).sum() + (shared**2).sum())

    value.loss.backward()
    beta = batch["embedding"]
    for got, want in (
        (embedding.grad, ref.numeric_gradient(lambda x: total(x, latents, shared), beta)),
        (objective.fusion.latents.grad, ref.numeric_gradient(lambda x: total(beta, x, shared), latents)),
        (objective.fusion.shared.grad, ref.numeric_gradient(lambda x: total(beta, latents, x), shared)),
    ):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-4)
    assert np.abs(embedding.grad.numpy()).max() > 1e-3, "the gradient that is compared is not zero"


def test_golden_temperatures():
    def flsw(gamma):
        found = sample_temperatures(
            GOLDEN_STUDENT,
            GOLDEN_TEACHER,
            kind="flsw",
            base=10,
            slope=40,
            gamma=gamma,
            lowest=0.01,
            highest=100,
        )
        return found.values.tolist()

    assert flsw(1) == pytest.approx([17.615, 2.385], abs=1e-3)
    assert flsw(2) == pytest.approx([13.417, 6.583], abs=1e-3)
    assert flsw(0.5) == pytest.approx([19.193, 0.807], abs=1e-3)
    found = sample_temperatures(
        GOLDEN_STUDENT, None, kind="cwsm", base=4, slope=1, gamma=1, lowest=1, highest=20
    )
    assert found.values.tolist() == pytest.approx([4.7224, 3.2776], abs=1e-4)
    assert not found.clamped.any()


def test_temperatures_are_clamped_and_said_to_be(batch):
    student, teacher = (torch.from_numpy(batch[name]) for name in ("student", "embedding"))
    teacher = torch.from_numpy(batch["teachers"][0])
    numbers = {"base": 10.0, "slope": 40.0, "gamma": 0.5, "lowest": 3.0, "highest": 12.0}
    found = sample_temperatures(student, teacher, kind="flsw", **numbers)
    free = ref.flsw_temperatures(batch["student"], batch["teachers"][0], 10, 40, 0.5)
    np.testing.assert_allclose(found.values.numpy(), np.clip(free, 3, 12), rtol=1e-4)
    np.testing.assert_array_equal(found.clamped.numpy(), (free < 3) | (free > 12))
    assert 0 < found.clamped.sum() < N
    assert not found.values.requires_grad


@pytest.mark.parametrize("name", ["dtd-flsw", "dtd-cwsm", "ka-dtd"])
def test_dynamic_temperature_whole(batch, name):
    """T_x² stands inside the mean; KA-PS comes before FLSW; omega is of the fused teacher."""
    config = METHODS[name].objective
    value, student = value_of(batch, config)
    dynamic, labels = config.dynamic_temperature, batch["labels"]
    teachers = batch["teachers"]
    if name == "ka-dtd":
        teachers = np.array([[ref.shifted(t[n], labels[n]) for n in range(N)] for t in teachers])
    if dynamic.kind == "flsw":
        temperatures = ref.flsw_temperatures(
            batch["student"], teachers.mean(0), 10, 40, 0.5, dynamic.lowest, dynamic.highest
        )
    else:
        temperatures = ref.cwsm_temperatures(batch["student"], 4, 1, dynamic.lowest, dynamic.highest)
    np.testing.assert_allclose(value.temperatures.values.numpy(), temperatures, rtol=1e-3)
    want = reference_loss(
        batch["student"], teachers, labels, temperature=temperatures, soft_weight=0.9, hard_weight=0.1
    )
    value.loss.backward()
    assert value.loss.item() == pytest.approx(want.loss.mean(), rel=1e-3)
    np.testing.assert_allclose(student.grad.numpy() * N, want.grad_student, rtol=1e-2, atol=1e-3)


def test_dynamic_temperature_without_slope_is_kd(batch):
    kd = value_of(batch, METHODS["kd"].objective)[0].loss
    for kind in ("flsw", "cwsm"):
        changes = {"dynamic_temperature": {"kind": kind, "slope": 0.0}}
        flat = value_of(batch, resolve_objective("kd", changes, "test"))[0].loss
        assert flat.item() == pytest.approx(kd.item(), rel=1e-6)


def test_shift_of_logits_is_shift_of_probs(batch):
    student, labels, targets = tensors(batch)
    moved = [shift_logits(logits, labels) for logits in targets.logits]
    for temperature in (1.0, 4.0, 20.0):
        for combine in ("mixture", "sum"):
            fields = {"temperature": temperature, "combine": combine}
            by_probs = soft_target_loss(student, targets.logits, labels, adjustment="shift", **fields)
            torch.testing.assert_close(by_probs, soft_target_loss(student, moved, labels, **fields))
    assert not torch.equal(torch.stack(moved), torch.stack(targets.logits))
    for teacher, logits in zip(moved, batch["teachers"], strict=True):
        want = [ref.shifted(logits[n], batch["labels"][n]) for n in range(N)]
        np.testing.assert_allclose(teacher.numpy(), np.array(want), rtol=1e-6)


def test_fused_logits_are_a_weighted_mean(batch):
    teachers = [torch.from_numpy(t).float() for t in batch["teachers"]]
    weights = torch.rand(N, K, generator=torch.manual_seed(0))
    want = (torch.stack(teachers, 1) * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(fused_logits(teachers, weights), want)
    torch.testing.assert_close(fused_logits(teachers, None), torch.stack(teachers).mean(0))
    torch.testing.assert_close(fused_logits(teachers[:1], None), teachers[0])


@pytest.mark.parametrize(
    ("loss", "reference"), [(angle_loss, ref.angle_loss), (distance_loss, ref.distance_loss)]
)
def test_relations_against_loops(batch, loss, reference):
    student = torch.from_numpy(batch["student"]).requires_grad_()
    teacher = torch.from_numpy(batch["teachers"][0]).requires_grad_()
    value = loss(student, teacher)
    assert value.item() == pytest.approx(reference(batch["student"], batch["teachers"][0]), rel=1e-9)
    value.backward()
    want = ref.numeric_gradient(lambda x: reference(x, batch["teachers"][0]), batch["student"])
    np.testing.assert_allclose(student.grad.numpy(), want, rtol=1e-5, atol=1e-8)
    assert teacher.grad is None
    assert loss(student, student).item() == 0
    student.grad = None
    value = loss(torch.cat([student, student[:3]]), torch.cat([teacher, teacher[:3]]))
    twice = [np.concatenate([rows, rows[:3]]) for rows in (batch["student"], batch["teachers"][0])]
    assert value.item() == pytest.approx(reference(*twice), rel=1e-9), "pairs of equal rows count"
    value.backward()
    assert torch.isfinite(student.grad).all(), "equal samples have no direction, and no NaN"


def test_angles_in_chunks_equal_angles_at_once():
    generator = torch.manual_seed(0)
    teacher = torch.randn(40, 10, generator=generator)
    gradients = []
    for chunk_bytes in (1, 40 * 4 * 8 * 50 * 7, 1 << 30):
        student = torch.randn(40, 10, generator=torch.manual_seed(1)).requires_grad_()
        chunked_angle_loss(student, teacher, chunk_bytes).backward()
        gradients.append(student.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_memory_of_angles_is_bounded():
    """128 samples have 8.4 MB of angles in float32; with the backward pass several times that."""
    student = torch.randn(128, 10, generator=torch.manual_seed(0)).requires_grad_()
    teacher = torch.randn(128, 10)
    peaks = []
    for chunk_bytes in (4 << 20, 1 << 40):
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as seen:
            chunked_angle_loss(student, teacher, chunk_bytes).backward()
        sizes = [event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage > 0]
        peaks.append(max(sizes))
    assert peaks[0] < 4 << 20 < 8 << 20 <= peaks[1]


def test_amtml_with_one_teacher_is_kd(batch):
    one = batch["teachers"][:1]
    changes = {"terms": {"angle": None, "latents": None}}
    amtml = resolve_objective("amtml", changes, "test", classes=10)
    kd = resolve_objective("kd", {"soft_weight": 0.14, "hard_weight": 0.3, "temperature": 5.0}, "test")
    got, student = value_of(batch, amtml, one)
    want, other = value_of(batch, kd, one)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    got.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(student.grad, other.grad)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.objective.needs().fused])
def test_equal_teachers_are_one_teacher(batch, name):
    fitted = dict.fromkeys(METHODS[name].objective.terms.keys() - {"angle"})
    config = resolve_objective(name, {"terms": fitted}, "test", classes=C)
    one, student = value_of(batch, config, batch["teachers"][:1])
    three, other = value_of(batch, config, np.repeat(batch["teachers"][:1], 3, axis=0))
    assert three.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
    one.loss.backward()
    three.loss.backward()
    torch.testing.assert_close(other.grad, student.grad, rtol=1e-4, atol=1e-6)


def test_combination_is_the_fusions_own_unless_it_is_said(batch):
    for name, fusion in FUSIONS.items():
        weights = {"auto": None, "mixture": None, "sum": None}
        if fusion.choose is not None or fusion.unifies:  # of one target both are the same
            continue
        for combine in weights:
            config = resolve_objective("kd", {"fusion": {"name": name}, "combine": combine}, "test")
            weights[combine] = value_of(batch, config)[0].terms["soft_target"].item()
        assert weights["auto"] == weights[fusion.combine]
        assert abs(weights["mixture"] - weights["sum"]) > 1e-3


def test_which_tensors_get_gradients(batch):
    config = resolve_objective("amtml", {"terms": {"distance": {}}}, "test", classes=10)
    objective = Objective(config, context())
    student, labels, targets = tensors(batch)
    for logits in targets.logits:
        logits.requires_grad_()
    embedding = torch.from_numpy(batch["embedding"]).float().requires_grad_()
    objective(loss_inputs(student, labels, targets, embedding=embedding)).loss.backward()
    for tensor in (student, embedding, *objective.fusion.parameters()):
        assert tensor.grad.abs().max() > 0
    assert all(logits.grad is None for logits in targets.logits)

    alone = resolve_objective(
        "amtml", {"soft_weight": 0.0, "hard_weight": 0.0, "terms": {"latents": None}}, "test", classes=C
    )
    objective = Objective(alone, context())
    student, labels, targets = tensors(batch)
    embedding = torch.from_numpy(batch["embedding"]).float().requires_grad_()
    objective(loss_inputs(student, labels, targets, embedding=embedding)).loss.backward()
    assert student.grad.abs().max() > 0
    untouched = embedding.grad
    assert untouched is None or untouched.abs().max() == 0, "angles give no gradient to the weights"


def test_latents_are_frozen_after_their_phase(batch):
    config = resolve_objective("amtml", {"fusion": {"joint_epochs": 2}}, "test", classes=10)
    objective = Objective(config, context())
    student, labels, targets = tensors(batch)
    embedding = torch.from_numpy(batch["embedding"]).float().requires_grad_()
    for epoch, trained in ((0, True), (1, True), (2, False)):
        objective.begin_epoch(epoch)
        objective.zero_grad()
        value = objective(loss_inputs(student, labels, targets, embedding=embedding, step=Step(epoch)))
        value.loss.backward()
        assert all((p.grad is not None) == trained for p in objective.fusion.parameters())
        assert ("latents" in value.terms) == trained
        assert embedding.grad.abs().max() > 0, "the gradient to the student goes on"


def test_terms_add_up_and_are_named(batch):
    value, _ = value_of(
        batch, resolve_objective("amtml", {"terms": {"distance": {"weight": 2.0}}}, "test", classes=10)
    )
    assert list(value.terms) == ["soft_target", "angle", "latents", "distance"]
    assert float(sum(value.terms.values())) == pytest.approx(value.loss.item(), rel=1e-6)
    student, _, targets = tensors(batch)
    theirs = torch.softmax(torch.stack(targets.logits, 1) / 5, 2)
    mixture = (value.weights[:, :, None] * theirs).sum(1)
    ours = student_embedding(student, "probs", 5.0)
    assert value.terms["angle"].item() == pytest.approx(angle_loss(ours, mixture).item(), rel=1e-5)
    assert value.terms["distance"].item() == pytest.approx(2 * distance_loss(ours, mixture).item(), rel=1e-5)


def test_random_teacher_depends_on_seed_epoch_and_batch_alone():
    config = METHODS["random"].objective

    def draws(seed, epoch):
        objective = Objective(config, BuildContext(teachers=3, seed=seed))
        return [objective.teachers_read(Step(epoch, number))[0] for number in range(300)]

    assert draws(0, 0) == draws(0, 0)
    assert len({tuple(draws(*place)) for place in ((0, 0), (0, 1), (1, 0))}) == 3
    counts = np.bincount(draws(0, 0))
    assert len(counts) == 3
    assert counts.min() > 70


def test_one_teacher_is_read_where_one_is_chosen(batch):
    student, labels, targets = tensors(batch)
    for name, index in (("best", 1), ("random", 2)):
        config = METHODS[name].objective
        objective = Objective(config, BuildContext(teachers=3, accuracies=(0.5, 0.9, 0.7), seed=0))
        step = next(s for s in (Step(0, n) for n in range(99)) if objective.teachers_read(s) == (index,))
        alone = Targets([targets.logits[index]], teachers=(index,))
        want = Objective(METHODS["kd"].objective)(loss_inputs(student, labels, alone)).loss
        assert objective(loss_inputs(student, labels, targets, step=step)).loss.item() == pytest.approx(
            want.item()
        )
        assert objective(loss_inputs(student, labels, alone, step=step)).loss.item() == pytest.approx(
            want.item()
        )


def test_adjustment_per_teacher(batch):
    config = resolve_objective("kd", {"adjustment": ["shift", "none", "smooth"]}, "test")
    want = reference_loss(
        batch["student"], batch["teachers"], batch["labels"], temperature=4.0,
        adjustment=("shift", "none", "smooth"), soft_weight=0.9, hard_weight=0.1,
    )  # fmt: skip
    assert value_of(batch, config)[0].loss.item() == pytest.approx(want.loss.mean(), rel=1e-5)


def test_confidence_takes_mixed_labels(batch):
    student, labels, targets = tensors(batch)
    config = METHODS["ca-mkd"].objective
    whole = MixedLabels(labels, labels.roll(1), torch.ones(N))
    got = Objective(config, context())(loss_inputs(student, whole, targets))
    want = Objective(config, context())(loss_inputs(student, labels, targets))
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)


def test_schedules():
    def values(**fields):
        return [Schedule(epochs=4, **fields).at(epoch) for epoch in range(6)]

    assert values(shape="warmup", end=2.0) == [0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert values(shape="cosine", start=1.0, end=0.0) == pytest.approx(
        [1, 0.853553, 0.5, 0.146447, 0, 0], abs=1e-6
    )
    assert values(shape="ramp") == pytest.approx(
        [np.exp(-5 * (1 - e / 4) ** 2) for e in range(4)] + [1, 1], rel=1e-9
    )


def test_weights_follow_their_schedule(batch):
    config = resolve_objective("kd", {"soft_weight": {"shape": "warmup", "end": 0.9, "epochs": 2}}, "test")
    hard = value_of(batch, config, step=Step(0))[0].loss.item()
    whole = value_of(batch, METHODS["kd"].objective)[0].loss.item()
    half = value_of(batch, config, step=Step(1))[0].loss.item()
    assert value_of(batch, config, step=Step(2))[0].loss.item() == pytest.approx(whole)
    assert half == pytest.approx((hard + whole) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fusion": {"name": "confidnce"}}, "fusion: unknown name 'confidnce', did you mean 'confidence'?"),
        ({"fusion": {"name": "entropy", "weights": [1, 2]}}, "fusion.weights: unknown key of 'entropy'"),
        ({"fusion": {"weights": [0, 0]}}, "weights are all zero: give at least one teacher a weight"),
        ({"fusion": {"teacher": 1}}, "fusion.teacher: unknown key of 'fixed'"),
        ({"terms": {"hnt": {}}}, "terms.hnt: unknown term 'hnt', did you mean 'hint'?"),
        ({"terms": {"hint": {"weigth": 1}}}, "weigth: unknown key, did you mean 'weight'?"),
        ({"fusion": {"name": "random"}, "terms": {"hint": {"weight": 1}}},
         "hints need every teacher, but fusion 'random' reads one at a time"),
        ({"dynamic_temperature": {"lowest": 30}}, "dynamic_temperature.lowest is 30, above highest (20)"),
        ({"dynamic_temperature": {"kind": "dtd"}}, "kind: expected 'none', 'flsw'"),
        ({"soft_weight": {"shape": "steps", "epochs": 3}}, "soft_weight.shape: expected 'warmup'"),
    ],
)  # fmt: skip
def test_refusals(changes, text):
    with pytest.raises(ValueError) as caught:
        resolve_objective("kd", changes, "the recipe")
    assert text.removeprefix("objective: ") in str(caught.value)


def test_what_has_to_be_fitted_is_refused_unfitted():
    """Without its setting it would leave out hints, or draw one teacher of one."""
    for name in ("random", "best", "amtml", "amtml-hints"):
        with pytest.raises(RecipeError, match="has to be fitted to its teachers and its student"):
            Objective(METHODS[name].objective)
    Objective(METHODS["ka-dtd"].objective)


def test_an_objective_is_float32_under_autocast(batch):
    pair = FeaturePair(0, "tap", "layer", (6, 2, 2), (3, 4, 4))
    objective = Objective(METHODS["amtml-hints"].objective, context(pairs_by_term={"hint": (pair,)}))
    student, labels, targets = tensors(batch)
    generator = torch.manual_seed(0)
    theirs = {(0, "tap"): torch.randn(N, 6, 2, 2, generator=generator)}
    targets = Targets(targets.logits, theirs)
    embedding = torch.from_numpy(batch["embedding"]).float()
    features = {"layer": torch.randn(N, 3, 4, 4, generator=generator)}
    given = loss_inputs(student, labels, targets, embedding=embedding, features=features)
    want = objective(given)
    with torch.autocast("cpu", torch.bfloat16):
        got = objective(given)
    assert torch.equal(got.weights, want.weights)
    assert got.terms == want.terms


def test_temperatures_couple_a_batch_only_where_they_are_used():
    assert METHODS["dtd-cwsm"].objective.needs().whole_batch == ("dynamic_temperature",)
    hints_alone = {"soft_weight": 0.0, "terms": {"hint": {}}}
    assert resolve_objective("dtd-cwsm", hints_alone, "test").needs().whole_batch == ()


def test_teachers_go_from_shallow_to_deep():
    assert [depth_group(k, 3, 3) for k in range(3)] == [0, 1, 2]
    assert [depth_group(k, 2, 4) for k in range(2)] == [0, 3]
    assert [depth_group(k, 5, 2) for k in range(5)] == [0, 0, 1, 1, 1]
    assert [depth_group(0, 1, groups) for groups in (1, 2, 3, 4)] == [0, 0, 1, 1]


def test_small_latents_begin_with_nearly_equal_weights(batch):
    config = resolve_objective("amtml", {"fusion": {"init": 0.01}}, "test", classes=10)
    student, labels, targets = tensors(batch)
    given = loss_inputs(student, labels, targets, embedding=torch.from_numpy(batch["embedding"]).float())
    value = Objective(config, context())(given)
    torch.testing.assert_close(value.weights, torch.full((N, K), 1 / K), atol=0.01, rtol=0)
    wide = Objective(METHODS["amtml"].objective, context())(given)
    assert wide.weights.max() > 0.5
