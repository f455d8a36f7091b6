"""Exchanges between students: targets, losses and gradients, against float64 and published figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import CPU, make_recipe
from scipy import optimize
from test_distill_published import agree, figures

from coursepack.data import view_recipe
from coursepack.data.views.mixing import Mix
from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.exchange.base import ExchangeInputs, GroupContext, MemberShapes
from coursepack.distill.exchange.collaborative import (
    linear_target,
    min_logit_target,
    naive_target,
    weights_of_errors,
)
from coursepack.distill.losses.base import LossInputs, Step, StudentOutput
from coursepack.distill.methods import METHODS
from coursepack.distill.objective import Objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.group import make_group
from coursepack.distill.training.loop import new_metrics, train_steps
from coursepack.distill.training.step import train_step
from coursepack.errors import RecipeError

M, N, C, D = 3, 6, 5, 4
SHAPE = (3, 4, 4)
PEERS = [name for name, method in METHODS.items() if method.objective.needs().peers]


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape))


def built(name, *, students=M, shapes=None, **changes):
    """An exchange in float64."""
    config = EXCHANGES[name].config.model_validate({"name": name, **changes})
    shapes = shapes or [SHAPE] * students
    members = tuple(MemberShapes(D, f"layer{index}", shape) for index, shape in enumerate(shapes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EXCHANGES[name].build(config, GroupContext(members, C)).double()


def outputs_of(students=M, shapes=None):
    """Outputs of students with gradient: logits, embedding and last map."""
    shapes = shapes or [SHAPE] * students
    return tuple(
        StudentOutput(
            normal(N, C, seed=index).requires_grad_(),
            normal(N, D, seed=10 + index).requires_grad_(),
            {f"layer{index}": normal(N, *shape, seed=20 + index).requires_grad_(), "other": normal(N, 2)},
        )
        for index, shape in enumerate(shapes)
    )


LABELS = torch.arange(N) % C


def inputs_of(outputs, epoch=0):
    return ExchangeInputs(outputs, LABELS, Step(epoch))


def kl(target, student, temperature=1.0):
    """T² KL(target || student) of logits per row."""
    log_p, log_q = (target / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)


# Deep mutual learning and LET


@pytest.mark.parametrize("target", ["each", "mean"])
def test_outputs_are_detached(target):
    outputs = outputs_of()
    targets = built("outputs", target=target)(inputs_of(outputs)).targets
    for index, own in enumerate(targets):
        others = [outputs[other].logits for other in range(M) if other != index]
        wanted = [each.detach() for each in (others if target == "each" else [sum(others) / 2])]
        for got, want in zip(own, wanted, strict=True):
            agree(got, want)
            assert not got.requires_grad


def test_let_updates_the_teacher_first_on_its_own_objective():
    recipe = make_recipe(method="let", peers=["digits-mlp"], limit=64)
    setup = prepare(recipe, CPU)
    student, teacher = (state.learner.objective.config for state in make_group(setup))
    assert (student.hard_weight, student.terms["mutual"].weight) == (0.0, 1.0)
    assert (teacher.hard_weight, teacher.terms["mutual"].weight) == (0.6, 0.4)
    group = make_group(setup)
    batch = next(setup.batches(0))
    before = [state.learner.logits(batch).detach().double() for state in group]
    said = {}
    log = lambda state, output, _rows: said.setdefault(group.index(state), output.value)  # noqa: E731 - one line
    train_step([group], batch, lambda *_: None, Step(), log=log)
    assert list(said) == [1, 0], "the teacher is first"
    cross_entropy = F.cross_entropy(before[1], batch.labels)
    want = 0.6 * cross_entropy + 0.4 * kl(before[0], before[1]).mean()
    assert said[1].loss.item() == pytest.approx(want.item(), rel=1e-5)
    group[1].learner.eval()
    with torch.no_grad():
        updated = group[1].learner.logits(batch).double()
    assert said[0].loss.item() == pytest.approx(kl(updated, before[0]).mean().item(), rel=1e-5)
    assert set(said[0].terms) == {"cross_entropy", "mutual"}
    assert said[0].terms["cross_entropy"] == 0
    rates = [state.optimizer.param_groups[0]["lr"] for state in group]
    assert rates[1] == pytest.approx(0.3 * rates[0])


# Collaborative learning (KDCL)


def test_the_naive_target_is_of_the_best_student_of_each_sample():
    logits = torch.stack([output.logits.detach() for output in outputs_of()])
    target = naive_target(logits, LABELS)
    for row in range(N):
        losses = [F.cross_entropy(each[row], LABELS[row]).item() for each in logits]
        assert torch.equal(target[row], logits[int(np.argmin(losses)), row])


def test_the_smallest_logits_after_those_of_the_label():
    logits = torch.stack([output.logits.detach() for output in outputs_of()])
    target = min_logit_target(logits, LABELS)
    for row in range(N):
        for column in range(C):
            want = min(float(each[row, column] - each[row, LABELS[row]]) for each in logits)
            assert target[row, column].item() == pytest.approx(want)
    assert (target.gather(1, LABELS[:, None]) == 0).all()


@pytest.mark.parametrize("students", [2, 3, 4])
def test_the_linear_target_has_the_smallest_cross_entropy_of_all_combinations(students):
    logits = torch.stack([normal(N, C, seed=index) for index in range(students)])
    target = linear_target(logits, LABELS)
    for row in range(N):
        each = logits[:, row].numpy()

        def loss(shares, each=each, row=row):
            mixed = shares @ each
            return float(np.log(np.exp(mixed - mixed.max()).sum()) + mixed.max() - mixed[LABELS[row]])

        best = min(
            (
                optimize.minimize(
                    loss, start, bounds=[(0, 1)] * students, method="SLSQP",
                    constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1},
                ).fun
                for start in np.vstack([np.eye(students), np.full(students, 1 / students)])
            ),
        )  # fmt: skip
        assert F.cross_entropy(target[row], LABELS[row]).item() == pytest.approx(best, abs=1e-4)


def test_the_general_target_weighs_students_by_the_errors_of_the_epoch_before():
    exchange, outputs = built("collaborative", target="general"), outputs_of()
    first = exchange(inputs_of(outputs)).targets[0][0]
    agree(first, sum(output.logits.detach() for output in outputs) / M)
    errors = torch.stack([(o.logits.softmax(1) - F.one_hot(LABELS, C)).detach().flatten() for o in outputs])
    inverse = torch.linalg.inv(errors @ errors.T)
    exchange.begin_epoch(1)
    weights = inverse.sum(1) / inverse.sum()
    torch.testing.assert_close(exchange.weights, weights, rtol=1e-3, atol=1e-3)
    second = exchange(inputs_of(outputs)).targets[0][0]
    want = sum(share * o.logits.detach() for share, o in zip(weights, outputs, strict=True))
    torch.testing.assert_close(second, want, rtol=1e-2, atol=1e-2)
    before = {name: value.clone() for name, value in exchange.state_dict().items()}
    resumed = built("collaborative", target="general")
    resumed.load_state_dict(before)
    resumed.begin_epoch(1)  # a run that is resumed within an epoch begins it again
    torch.testing.assert_close(resumed.state_dict(), before, rtol=0, atol=0)
    assert weights_of_errors(torch.eye(4)).tolist() == pytest.approx([0.25] * 4)


def test_every_student_follows_the_same_target_without_gradient():
    for kind in ("naive", "linear", "min_logit", "general"):
        targets = built("collaborative", target=kind)(inputs_of(outputs_of())).targets
        assert len(targets) == M
        assert all(own == targets[0] and not own[0].requires_grad for own in targets)


# OKDDip


def test_published_attention():
    held = figures("okddip", "attention")
    peers = held["features"].shape[1]
    members = tuple(MemberShapes(64) for _ in range(1 + peers))
    row = EXCHANGES["attention"]
    exchange = row.build(row.config(), GroupContext(members, 6)).double()
    exchange.query.weight.data.copy_(held["query_weight"])
    exchange.key.weight.data.copy_(held["key_weight"])
    mixtures = exchange.mixtures(held["features"].double(), held["peer_logits"].double().transpose(1, 2))
    agree(mixtures, held["okddip_targets"].transpose(1, 2))


@pytest.mark.parametrize("gradient", ["all", "attention"])
def test_who_receives_a_gradient_from_attention(gradient):
    exchange, outputs = built("attention", gradient=gradient), outputs_of()
    targets = exchange(inputs_of(outputs)).targets
    leader, *own = outputs
    logits = torch.stack([output.logits for output in own], 1)
    hidden = torch.stack([output.embedding for output in own], 1)
    query, key = hidden @ exchange.query.weight.T, hidden @ exchange.key.weight.T
    weights = (query @ key.transpose(1, 2)).softmax(2)
    for index in range(M - 1):
        agree(targets[1 + index][0], (weights[:, index, :, None] * logits).sum(1).detach())
    agree(targets[0][0], logits.mean(1).detach())
    loss = sum(
        kl(target, output.logits, 3.0).mean() for (target,), output in zip(targets, outputs, strict=True)
    )
    loss.backward()
    assert exchange.query.weight.grad.abs().max() > 0
    assert all(output.embedding.grad.abs().max() > 0 for output in own)
    assert leader.embedding.grad is None
    detached = [output.logits.detach() for output in own]
    reference = [output.logits.detach().clone().requires_grad_() for output in own]
    mixed = reference if gradient == "all" else detached
    stacked = torch.stack(mixed, 1)
    want = kl(stacked.mean(1), leader.logits.detach(), 3.0).mean()
    for index, each in enumerate(reference):
        want = want + kl((weights.detach()[:, index, :, None] * stacked).sum(1), each, 3.0).mean()
    want.backward()
    for output, each in zip(own, reference, strict=True):
        agree(output.logits.grad, each.grad)


# ONE


def test_published_gate():
    held = figures("one", "gate")
    count, width = held["gate_weight"].shape
    members = (MemberShapes(width), *(MemberShapes(0) for _ in range(count - 1)))
    row = EXCHANGES["gate"]
    exchange = row.build(row.config(), GroupContext(members, 6)).double()
    exchange.linear.weight.data.copy_(held["gate_weight"])
    exchange.linear.bias.data.copy_(held["gate_bias"])
    outputs = tuple(
        StudentOutput(each.clone(), held["pooled"] if index == 0 else held["pooled"][:, :0])
        for index, each in enumerate(held["logits"])
    )
    exchanged = exchange(ExchangeInputs(outputs, held["labels"]))
    config = METHODS["one"].objective.terms["mutual"].model_copy(update={"weight": 1.0})
    agree(exchange.ensembles(outputs)["gated"], held["one_ensemble"])
    for index, targets in enumerate(exchanged.targets):
        # The release adds 1e-7 to every probability of the target.
        ours = kl(targets[0], outputs[index].logits, config.temperature).mean()
        agree(ours + config.temperature**2 * 6e-7, held["one_kl"][index])
        assert not targets[0].requires_grad


def test_the_gated_ensemble_learns_from_the_labels_with_all_students():
    exchange, outputs = built("gate"), outputs_of()
    losses = exchange(inputs_of(outputs)).losses
    assert [list(each) for each in losses] == [["gated_cross_entropy"], [], []]
    want = F.cross_entropy(exchange.ensembles(outputs)["gated"], LABELS)
    agree(losses[0]["gated_cross_entropy"], want.detach())
    losses[0]["gated_cross_entropy"].backward()
    assert all(output.logits.grad.abs().max() > 0 for output in outputs)
    assert exchange.linear.weight.grad.abs().max() > 0


# FFL


def test_published_feature_fusion():
    held = figures("ffl")
    shape = tuple(held["map_1"].shape[1:])
    members = tuple(MemberShapes(0, f"layer{index}", shape) for index in range(2))
    row = EXCHANGES["feature_fusion"]
    config = METHODS["ffl"].objective.exchange
    exchange = row.build(config, GroupContext(members, 5)).double()
    for ours, theirs in (("head", "fc2"), ("depthwise", "conv1"), ("norm1", "bn1"), ("pointwise", "conv1_1"),
                         ("norm2", "bn1_1")):  # fmt: skip
        for name, value in getattr(exchange, ours).named_parameters():
            value.data.copy_(held[f"w.{theirs}.{name}"])
    outputs = tuple(
        StudentOutput(
            held[f"logits_{index}"].clone().requires_grad_(),
            None,
            {f"layer{index - 1}": held[f"map_{index}"].clone().requires_grad_()},
        )
        for index in (1, 2)
    )
    step = Step(20)
    exchanged = exchange(ExchangeInputs(outputs, held["labels"], step))
    objective = Objective(METHODS["ffl"].objective)
    total = sum(
        objective(LossInputs(output, held["labels"], None, step, peers=targets)).loss
        for output, targets in zip(outputs, exchanged.targets, strict=True)
    )
    total = total + sum(exchanged.losses[0].values())
    total.backward()
    agree(exchange.ensembles(outputs)["fused"], held["ffl_fused_logits"])
    agree(total, held["ffl_loss"])
    for index, output in enumerate(outputs):
        agree(output.logits.grad, held[f"grad_logits_{index + 1}"])
    agree(outputs[0].features["layer0"].grad, held["grad_map_1"])
    agree(exchange.head.weight.grad, held["grad_fc_weight"])


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError) as refusal:
        built("feature_fusion", shapes=[(3, 4, 4), (6, 2, 2)])
    assert str(refusal.value) == (
        "exchange 'feature_fusion' joins the students' last maps, which are 3 x 4 x 4, 6 x 2 x 2 (C x H x "
        "W), expected one height and width: choose networks of one kind, or --method one, which reads "
        "embeddings"
    )


# AFD


def test_a_ring_of_discriminators():
    shapes = [(3, 4, 4), (5, 4, 4), (3, 2, 2)]
    exchange, outputs = built("discriminators", shapes=shapes, weight=0.5), outputs_of(shapes=shapes)
    targets = exchange(inputs_of(outputs)).targets
    for index, own in enumerate(targets):
        assert torch.equal(own[0], outputs[index - 1].logits)
        assert not own[0].requires_grad
    maps = [output.features[f"layer{index}"] for index, output in enumerate(outputs)]
    losses = exchange.second_step(inputs_of(outputs))
    telling = 0.0
    for index, own in enumerate(maps):
        member = exchange.members[index]
        other = F.adaptive_avg_pool2d(maps[index - 1], own.shape[2:])
        telling += float(((1 - member(other, own=False)) ** 2 + member(own, own=True) ** 2).mean().detach())
        fooled = ((1 - member(own, own=True)) ** 2).mean()
        assert losses[index]["adversarial"].item() == pytest.approx(0.5 * fooled.item())
    assert losses[0]["discriminators"].item() == pytest.approx(telling)


def test_discriminators_see_detached_maps_and_students_fixed_discriminators():
    exchange, outputs = built("discriminators"), outputs_of()
    losses = exchange.second_step(inputs_of(outputs))
    sum(each["adversarial"] for each in losses).backward(retain_graph=True)
    assert all(value.grad is None for value in exchange.parameters())
    received = [output.features[f"layer{index}"].grad.clone() for index, output in enumerate(outputs)]
    assert all(gradient.abs().max() > 0 for gradient in received)
    losses[0]["discriminators"].backward()
    assert all(value.grad is not None for value in exchange.parameters())
    for index, output in enumerate(outputs):
        assert torch.equal(output.features[f"layer{index}"].grad, received[index])


def test_the_adversarial_step_is_apart_and_smaller():
    recipe = make_recipe(method="afd", limit=64, optimizer={"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0})
    setup = prepare(recipe, CPU)
    group = make_group(setup)
    for _ in train_steps([group], setup.batches(0), None, [new_metrics(state) for state in group]):
        pass
    assert [state.second.param_groups[0]["lr"] for state in group] == pytest.approx([0.01, 0.01])
    head = group[0].learner.network.module.head.weight
    conv = group[0].learner.network.module.conv2.weight
    assert head.grad is None, "the second step leaves alone what lies behind the map"
    assert conv.grad is not None
    assert all(value.grad is not None for value in group[0].learner.exchange.parameters())
    assert "second" in group[0].state()


# All of them


@pytest.mark.parametrize("name", PEERS)
def test_every_method_lowers_its_students_losses(name):
    setup = prepare(make_recipe(method=name, limit=200, batch_size=50, optimizer={"lr": 0.01}), CPU)
    group, losses = make_group(setup), []
    for epoch in range(4):
        logs = [new_metrics(state) for state in group]
        for _ in train_steps([group], setup.batches(epoch), None, logs, epoch):
            pass
        losses.append([log.means()["loss"] for log in logs])
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True)), losses


@pytest.mark.parametrize("name", PEERS)
def test_gradient_scaling_is_refused_where_gradients_flow_between_students(name):
    recipe = make_recipe(method=name, limit=100, precision="float16")
    if EXCHANGES[METHODS[name].objective.exchange.name].joint:
        with pytest.raises(
            RecipeError, match="precision is float16, which scales the gradient of each student"
        ):
            prepare(recipe, CPU)
    else:
        prepare(recipe, CPU)


def test_mixed_labels_are_refused_where_a_target_needs_one_label():
    view = view_recipe("digits").model_copy(update={"mix": Mix(mixup_alpha=1.0)})
    for target, fits in (("naive", True), ("linear", False), ("min_logit", False), ("general", False)):
        objective = {"exchange": {"target": target}}
        recipe = make_recipe(method="kdcl", objective=objective, view=view, student="digits-small")
        if fits:
            prepare(recipe, CPU)
        else:
            with pytest.raises(RecipeError, match=f"exchange target '{target}'"):
                prepare(recipe, CPU)


def test_a_perceptron_has_no_map():
    setup = prepare(make_recipe(method="ffl", student="digits-cnn", peers=["digits-small"], limit=64), CPU)
    with pytest.raises(RecipeError, match="student 'digits-small' has no block that gives maps"):
        make_group(setup)


def test_embeddings_of_other_widths_are_refused():
    peers = ["digits-cnn", "digits-mlp"]
    setup = prepare(make_recipe(method="okddip", student="digits-small", peers=peers, limit=64), CPU)
    with pytest.raises(RecipeError, match="embeddings of the peers, which have 64, 128 values"):
        make_group(setup)


def test_the_page_on_peers_has_every_method_and_every_option():
    page = (Path(__file__).parents[1] / "docs" / "peers.md").read_text()
    assert not [name for name in PEERS if f"[`{name}`](#{name}" not in page]
    options = {name for row in EXCHANGES.values() for name in row.config.model_fields} - {"name"}
    assert not [name for name in options if f"| `exchange.{name}` |" not in page]
