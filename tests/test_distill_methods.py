"""Every method end to end on digits stores: what is trained, fetched, refused and told."""

import json
import shlex
from typing import Literal

import numpy as np
import pytest
import torch
from builders import CPU, PAIRS, PHASES, few_by_default, make_recipe, write_store, write_teacher
from click.testing import CliRunner

from coursepack.data import open_source
from coursepack.data.sources import evaluation_spec
from coursepack.data.store import StoreReader, load_manifest
from coursepack.distill.cli import main as distill
from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.fusion import FUSIONS
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import Loss, Needs, Step, TermConfig
from coursepack.distill.methods import METHODS, from_mean_reduction
from coursepack.distill.methods.description import describe
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.runs.folder import load_run, load_runs
from coursepack.distill.runs.train import train
from coursepack.distill.setup.build import make_objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.setup.student import StudentShapes, probe_student
from coursepack.distill.targets.teacher_stores import make_targets, open_teacher_stores
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError, TrainingDiverged, UnknownName
from coursepack.kernels import decode
from coursepack.models import Network, Preprocessing, build_network
from coursepack.precompute.cli import main as precompute

TAUGHT = [name for name, method in METHODS.items() if method.objective.needs().teachers]


@pytest.mark.parametrize("name", few_by_default(METHODS))
def test_every_method_trains_from_the_command_line(tmp_path, stores_of, name):
    stores = stores_of(name) if name in TAUGHT else []
    words = ["train", "--student", "digits-cnn", "--method", name, "--limit", "130"]
    words += ["--epochs", str(max(2, METHODS[name].objective.fusion.fewest_epochs(len(stores))))]
    words += [part for store in stores for part in ("--store", str(store))]
    words += [] if stores else ["--source", "digits", "--view", "digits"]
    if METHODS[name].objective.needs().peers:
        words += ["--peers", str(EXCHANGES[METHODS[name].objective.exchange.name].students[0])]
    if name in PAIRS:
        words += ["--set", f"objective.terms.{name}.pairs={json.dumps(PAIRS[name])}"]
    words += [part for phase in PHASES.get(name, ()) for part in ("--set", phase)]
    result = CliRunner().invoke(distill, [*words, "--lr", "0.01", "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    lines = load_runs(tmp_path / "o")[0].metrics
    told = lines[-1]
    assert 0 <= told["evaluation"]["calibration_error"] <= 1
    terms = set(told["train"]) - {"loss", "accuracy", "accuracy_top5", "nll", "calibration_error"}
    assert sum(told["train"][term] for term in terms) == pytest.approx(told["train"]["loss"], rel=1e-5)
    if not METHODS[name].objective.needs().fused:
        assert "teachers" not in told
        return
    teachers = told["teachers"]
    total = sum(teachers["weight"])
    abstains = FUSIONS[METHODS[name].objective.fusion.name].abstains  # on samples that no teacher knows
    assert 0 < total < 1 if abstains else total == pytest.approx(1, rel=1e-4)
    by_class = np.array(teachers["weight_by_class"])
    assert by_class.shape == (3, 10)
    assert 0 <= teachers["agreement"] <= 1
    assert teachers["kl"] >= 0
    assert (sum(teachers["shifted"]) > 0) == (METHODS[name].objective.adjustment != "none")
    if METHODS[name].objective.dynamic_temperature.kind == "none":
        assert "temperature" not in told
    else:
        seen = told["temperature"]
        assert seen["min"] <= seen["mean"] <= seen["max"]
        assert 0 <= seen["clamped"] <= 1


@pytest.mark.parametrize(("name", "phase"), [("ab", 30), ("ft", 6)])
def test_runs_that_end_in_the_first_phase_are_refused(tmp_path, tapped, name, phase):
    words = ["train", "--student", "digits-cnn", "--store", str(tapped[1]), "--method", name, "--limit", "64"]
    words += ["--set", f"objective.terms.{name}.pairs=[{{teacher: 0, tap: conv2, layer: conv2}}]"]

    def run(*more):
        return CliRunner().invoke(distill, [*words, *more, "--out", str(tmp_path / "o")])

    refused = run("--epochs", str(phase))
    shorter = [part for line in PHASES[name] for part in ("--set", line.replace("=1", f"={phase // 4}"))]
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"Error: the first phase of method '{name}' takes {phase} epochs, but the run has {phase}, so the "
        f"next one would never begin: give at least {phase + 1} --epochs, or a shorter phase, as "
        f"{' '.join(shorter)}\n"
    )
    assert "or a shorter phase" not in run("--epochs", "1").stderr
    assert run("--epochs", str(phase + 1)).exit_code == 0
    short = ["--epochs", "2", "--overwrite", *(part for line in PHASES[name] for part in ("--set", line))]
    assert run(*short).exit_code == 0


def test_only_what_is_declared_is_fetched(tapped, monkeypatch):
    read = []
    kind = type(prepare(make_recipe(tapped), CPU).readers[0])
    rows_of = kind._rows_of
    monkeypatch.setattr(
        kind,
        "_rows_of",
        lambda self, array, parts: read.append((self.name, array)) or rows_of(self, array, parts),
    )

    def fetched(method, **fields):
        read.clear()
        run = prepare(make_recipe(tapped, method=method, limit=64, student="digits-cnn", **fields), CPU)
        train_epoch([make_state(run)], run.batches(0), run.targets)
        return set(read)

    names = [store.name.removesuffix(".zarr") for store in tapped]
    assert fetched("kd") == {(name, "logits") for name in names}
    hints = {
        ("digits-mlp", "features/hidden1"),
        ("digits-cnn", "features/conv2"),
        ("digits-resnet", "features/layer2@pooled"),
    }
    assert fetched("amtml-hints") == {(name, "logits") for name in names} | hints
    assert len(fetched("best")) == 1
    assert len(fetched("random")) == 1, "one batch, one teacher"
    only_hints = {"soft_weight": 0.0, "terms": {"hint": {}}}
    assert fetched("kd", objective=only_hints) == hints


def test_best_is_the_teacher_that_was_right_most_often(tapped):
    run = prepare(make_recipe(tapped, method="best"), CPU)
    correct = [sum(r["sums"]["correct"] for r in load_manifest(s).view_records.values()) for s in tapped]
    assert make_state(run).learner.objective.teachers_read(Step()) == (int(np.argmax(correct)),)
    asked = prepare(make_recipe(tapped, method="best", objective={"fusion": {"teacher": 1}}), CPU)
    assert make_state(asked).learner.objective.teachers_read(Step()) == (1,)


def test_stores_that_best_does_not_read_are_not_opened(tapped, monkeypatch):
    opened = []

    def spy(verb):
        act = getattr(StoreReader, verb)
        monkeypatch.setattr(
            StoreReader, verb, lambda self, *words: opened.append(self.name) or act(self, *words)
        )

    for verb in ("open", "prefetch", "components"):
        spy(verb)
    fields = {"limit": 64, "student": "digits-cnn", "objective": {"fusion": {"teacher": 1}}}
    run = prepare(make_recipe(tapped, method="best", **fields), CPU)
    assert run.targets.arrays == [[], ["logits"], []]
    state = make_state(run)
    train_epoch([state], run.batches(0), run.targets)
    assert set(opened) == {"digits-cnn"}
    stores = open_teacher_stores(tapped)
    objective = make_objective(stores, build_network("digits-cnn", 10), "best", fields["objective"])
    targets = make_targets(stores, objective)
    assert targets.arrays == run.targets.arrays
    batch = next(run.batches(0))
    both = [each.fetch(batch) for each in (targets, prepare(make_recipe(tapped, limit=64), CPU).targets)]
    told = [state.learner(batch, each).value.loss for each in both]
    assert torch.equal(*told), "the same loss as of all three stores"
    kd = prepare(make_recipe(tapped, limit=64, student="digits-cnn"), CPU).recipe
    together = prepare(run.recipe, CPU, others=[kd])
    assert together.targets.arrays == [["logits"]] * 3, "another student reads all"


def test_two_learners_share_what_they_fetch(tapped):
    run = prepare(make_recipe(tapped, method="random", limit=200), CPU)
    other = prepare(make_recipe(tapped, method="kd", limit=200), CPU)
    together = [make_state(run), make_state(run, other.recipe)]
    first = train_epoch(together, run.batches(0), run.targets)
    alone = [train_epoch([make_state(maker)], run.batches(0), run.targets)[0] for maker in (run, other)]
    assert first[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-6)
    assert first[1]["loss"] == pytest.approx(alone[1]["loss"], rel=1e-6)


def test_a_learner_of_hints_alone_may_share_what_another_fetches(tapped):
    """It is handed logits that it does not look at, and tells what it would tell alone."""
    only_hints = {"soft_weight": 0.0, "terms": {"hint": {"weight": 0.01}}}
    fields = {"student": "digits-cnn", "limit": 200}
    hints = make_recipe(tapped, **fields, objective=only_hints)
    run = prepare(make_recipe(tapped, **fields), CPU, others=[hints])
    together = train_epoch([make_state(run), make_state(run, hints)], run.batches(0), run.targets)
    own = prepare(hints, CPU)
    assert together[1] == train_epoch([make_state(own)], own.batches(0), own.targets)[0]
    assert "teachers" in together[0]
    assert "teachers" not in together[1]


class Gap(torch.nn.Module):
    def forward(self, inputs):
        return (inputs.student.logits - decode(inputs.teachers.logits[0])).square().mean(1)


class GapConfig(TermConfig):
    term: Literal["gap"] = "gap"


def test_a_term_may_be_all_that_reads_teachers(tapped, monkeypatch):
    gap = Loss(GapConfig, "", "", lambda _: Needs(teacher_logits=True), lambda *_: Gap())
    monkeypatch.setitem(LOSSES, "gap", gap)
    objective = METHODS["supervised"].objective.model_copy(update={"terms": {"gap": GapConfig()}})
    recipe = make_recipe(tapped, limit=64).model_copy(update={"objective": objective})
    run = prepare(recipe, CPU)
    told = train_epoch([make_state(run)], run.batches(0), run.targets)[0]
    assert told["gap"] > 0
    assert told["loss"] == pytest.approx(told["gap"] + told["cross_entropy"], rel=1e-5)


def test_everything_that_learns_is_in_the_optimizer(tapped):
    run = prepare(make_recipe(tapped, method="amtml-hints", limit=64, student="digits-cnn"), CPU)
    state = make_state(run)
    held = {id(value) for group in state.optimizer.param_groups for value in group["params"]}
    before = {name: value.detach().clone() for name, value in state.learner.named_parameters()}
    assert held == {id(value) for value in state.learner.parameters()}
    train_epoch([state], run.batches(0), run.targets)
    moved = {name for name, value in state.learner.named_parameters() if not torch.equal(value, before[name])}
    assert {"objective.fusion.latents", "objective.fusion.shared"} <= moved
    assert {f"objective.terms.hint.adapters.{place}.change.weight" for place in range(3)} <= moved
    latents = [group for group in state.optimizer.param_groups if group["weight_decay"] == 0]
    assert len(latents[0]["params"]) == 2


def test_hints_can_be_assigned(tapped):
    pairs = [
        {"teacher": 2, "tap": "layer1", "layer": "conv1"},
        {"teacher": 2, "tap": "layer2:pooled", "layer": "hidden"},
    ]
    recipe = make_recipe(
        tapped,
        method="amtml-hints",
        objective={"terms": {"hint": {"pairs": pairs}}},
        student="digits-cnn",
        limit=64,
    )
    pairs = make_state(prepare(recipe, CPU)).learner.objective.terms["hint"].pairs
    assert [(p.teacher, p.tap, p.layer, p.teacher_shape, p.student_shape) for p in pairs] == [
        (2, "layer1", "conv1", (32, 8, 8), (16, 8, 8)),
        (2, "layer2@pooled", "hidden", (64,), (64,)),
    ]


def test_missing_features_are_refused_with_the_line_that_adds_them(tmp_path, teachers):
    store = write_store(tmp_path / "cnn.zarr", teachers[1])
    recipe = make_recipe([store], method="amtml-hints", student="digits-cnn", limit=64)
    with pytest.raises(RecipeError) as caught:
        prepare(recipe, CPU)
    first, second, line = str(caught.value).splitlines()
    assert first == "method 'amtml-hints' needs features that are not stored. Add them with"
    assert second == f"store '{store}' has no 'features/conv2'"
    assert line.strip() == (
        f"precompute run --teacher run:{teachers[1]} --source digits:train --view digits --views 2 "
        f"--encoding float32 --store {store} --tap conv2"
    )
    result = CliRunner().invoke(precompute, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    train(recipe, tmp_path / "o", device=CPU)


def test_flsw_is_refused_where_logits_are_missing(tmp_path, teachers):
    spec = "fake,classes=100,size=8,samples=100,channels=1"
    source, teacher = open_source(spec), write_teacher(tmp_path / "t", classes=100)
    store = write_store(tmp_path / "cnn.zarr", teacher, source=source, encoding="topk:3")
    fields = {"source": source.name, "evaluation": evaluation_spec(spec)}
    with pytest.raises(RecipeError) as caught:
        prepare(make_recipe([store], method="dtd-flsw", **fields), CPU)
    text = str(caught.value)
    assert "(FLSW) needs all logits, but store" in text
    assert f"--view digits --views 2 --store {tmp_path / 'cnn-dense.zarr'}" in text
    prepare(make_recipe([store], method="dtd-cwsm", **fields), CPU)


@pytest.mark.parametrize(
    ("method", "objective", "text"),
    [
        ("kd", {"fusion": {"weights": [1, 2]}}, "fusion.weights has 2 numbers, expected 3: one per store"),
        ("kd", {"adjustment": ["shift"]}, "adjustment has 1 names, expected 3: one per store"),
        ("best", {"fusion": {"teacher": 3}}, "fusion.teacher is 3, but there are 3 stores"),
        ("amtml-hints", {"terms": {"hint": {"pairs": [{"teacher": 4, "tap": "a", "layer": "b"}]}}},
         "terms.hint.pairs names teacher 4, but there are 3 stores: indices begin at 0"),
    ],
)  # fmt: skip
def test_refusals(stores, method, objective, text):
    with pytest.raises(RecipeError, match=text):
        prepare(make_recipe(stores, method=method, objective=objective), CPU)


def test_layers_that_do_not_exist_are_named(stores):
    recipe = make_recipe(stores, method="amtml", objective={"fusion": {"layer": "conv7"}})
    with pytest.raises(UnknownName, match=r"unknown layer 'conv7'.*Known: hidden, head"):
        make_state(prepare(recipe, CPU))


class Tokens(torch.nn.Module):
    """Sixteen tokens of width 6 for an image, and a head that reads the first."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(4, 6)
        self.head = torch.nn.Linear(6, 10)

    def forward(self, images):
        return self.head(self.embed(images.reshape(len(images), 16, 4))[:, 0])


def test_tokens_are_no_embedding():
    """The largest value over what follows the channels would be one over each token's own width."""
    student = Network("tokens", Tokens(), Preprocessing(size=8, mean=(0.0,), std=(1.0,)), 10)
    text = r"layer 'embed' of student 'tokens' cannot represent a sample \(shape \(16, 6\)\): it takes"
    with pytest.raises(RecipeError, match=text):
        probe_student(student, 1, embedding=True, embedding_layer="embed")
    assert probe_student(student, 1, embedding=True) == StudentShapes((10,), 6, {})


def test_an_embedding_can_be_a_layers_maximum(stores):
    recipe = make_recipe(
        stores, method="amtml", objective={"fusion": {"layer": "conv2"}}, student="digits-cnn", limit=64
    )
    run = prepare(recipe, CPU)
    state = make_state(run)
    assert state.learner.objective.fusion.latents.shape == (3, 32)
    train_epoch([state], run.batches(0), run.targets)


def test_every_method_says_what_it_is():
    for name, method in METHODS.items():
        assert method.formula, name
        assert method.source, name
    told = json.loads(CliRunner().invoke(distill, ["methods", "--json"]).stdout)
    assert [each["name"] for each in told] == list(METHODS)
    shown = CliRunner().invoke(distill, ["methods", "amtml"]).stdout
    for text in (
        "arXiv 2103.04062",
        "adaptive: w_k = softmax_k",
        "combined as a mixture",
        "loss      (1.4 / C) T²",
        '"soft_weight": "1.4 / C"',
        "LR_adaptive_learning, which takes it at T = 5",
        '"angle": {"weight": 1.0}',
    ):
        assert text in shown
    shown = CliRunner().invoke(distill, ["methods", "ab"]).stdout
    assert '"weight": {"shape": "step", "start": 0.003, "end": 0.0, "epochs": 30}' in shown
    assert "fusion" not in shown, "it reads no logits"
    assert all(name in CliRunner().invoke(distill, ["methods"]).stdout for name in METHODS)
    wrong = CliRunner().invoke(distill, ["methods", "amtm"])
    assert wrong.exit_code == 1
    assert "unknown method 'amtm'. Did you mean 'amtml'?" in wrong.stderr


def test_published_coefficients_are_converted():
    """AMTML's notebooks: mean KL times 2 alpha T², T = 5, alpha = 0.7: 3.5 with ten classes in our units."""
    for name in ("amtml", "amtml-hints"):
        for classes, want in ((10, 3.5), (100, 0.35)):
            objective = resolve_objective(name, {}, "test", classes=classes)
            assert objective.soft_weight * 5**2 == pytest.approx(want)
        changed = resolve_objective(name, {"soft_weight": 0.5}, "test", classes=100)
        assert changed.soft_weight == 0.5, "a given number is taken as it is"
    assert from_mean_reduction(1.4, classes=100) * 25 == pytest.approx(0.35)
    text = r"the default of objective.soft_weight is 1.4 / C, but the number of classes C is not known"
    with pytest.raises(RecipeError, match=text):
        resolve_objective("amtml", {}, "test")
    assert describe("amtml")["combine"] == "mixture"
    assert describe("ca-mkd")["combine"] == "sum"
    assert describe("simkd")["fusion"] is None, "it fuses no targets"
    assert describe("reviewkd")["defaults"]["terms"]["reviewkd"]["weight"]["epochs"] == 20


def test_a_recipe_spells_the_number_of_its_classes(tmp_path):
    """The command line and a recipe file know the classes of the source; what is written is a number."""
    spec = "fake,classes=100,size=8,samples=40,channels=1"
    source, teacher = open_source(spec), write_teacher(tmp_path / "t", classes=100)
    store = write_store(tmp_path / "t.zarr", teacher, source=source)
    words = [
        "train",
        "--student",
        "digits-small",
        "--method",
        "amtml",
        "--store",
        str(store),
        "--epochs",
        "1",
    ]
    result = CliRunner().invoke(distill, [*words, "--lr", "0.001", "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    written = (tmp_path / "o" / "recipe.yaml").read_text()
    assert "soft_weight: 0.014\n" in written
    assert load_run(tmp_path / "o").recipe.objective.soft_weight == 0.014
    again = ["train", str(tmp_path / "o" / "recipe.yaml"), "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(distill, again).exit_code == 0
    assert (tmp_path / "again" / "recipe.yaml").read_text() == written


@pytest.mark.parametrize("name", ["amtml", "dtd-flsw"])
def test_a_student_that_diverges_is_said_to(tmp_path, stores, name):
    recipe = make_recipe(stores, method=name, limit=200, epochs=3, optimizer={"lr": 1e30})
    with pytest.raises(
        TrainingDiverged, match=r"diverged in epoch \d: a (teacher|sample)'s \w+ is not finite"
    ):
        train(recipe, tmp_path / "o", device=CPU)
