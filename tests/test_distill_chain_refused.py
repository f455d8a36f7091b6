"""Wrong chains: refused before anything runs, with the stage, what is wrong there, and what to do."""

from pathlib import Path

import pytest
from builders import CPU, write_store, write_teacher
from click.testing import CliRunner

from coursepack.distill.cli import main as distill
from coursepack.distill.runs.chain.plan import plan_chain


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder with stores of other views and a run beside which chains are refused."""
    folder = tmp_path_factory.mktemp("beside")
    teacher = write_teacher(folder / "mlp", seed=1)
    write_store(folder / "digits.zarr", teacher)
    write_store(folder / "plain.zarr", teacher, view="none", views=1)
    return folder


TRAIN = "{name: %s, train: {student: digits-small, source: digits, view: digits, epochs: 1}}"
A, STORE = TRAIN % "a", "{name: store, precompute: {teacher: stage:a, views: 2}}"
PATH = A.replace("epochs: 1", "epochs: 5, keep_checkpoints: 2")
TARGETS = "{name: s, precompute: {teacher: '%s', views: 2}}"


def student(fields, name="b"):
    return f"{{name: {name}, train: {{student: digits-small, epochs: 1, {fields}}}}}"


REFUSED = {
    "later": ([TRAIN % "a", student("stores: [stage:store]"), STORE],
              "stage 'b' of 'c.yaml': stores names stage 'store', which comes later: a stage reads earlier "
              "ones only, so move 'store' before 'b'"),
    "itself": ([A, "{name: store, precompute: {teacher: stage:store, views: 2}}"],
               "stage 'store' of 'c.yaml': teacher names the stage itself, expected an earlier one"),
    "unknown": ([TRAIN % "teacher", "{name: store, precompute: {teacher: stage:techer, views: 2}}"],
                "stage 'store' of 'c.yaml': teacher names the unknown stage 'techer'. Did you mean "
                "'teacher'? Earlier stages: teacher."),
    "first": (["{name: store, precompute: {teacher: stage:x, views: 2}}"],
              "teacher names the unknown stage 'x'. Earlier stages: none."),
    "kind": ([A, student("stores: [stage:a]")],
             "stage 'b' of 'c.yaml': stores names stage 'a', a stage of kind 'train', expected one of kind "
             "'precompute'"),
    "bare": ([A, STORE, student("stores: [store]")],
             "stage 'b' of 'c.yaml': stores names 'store', which is a stage and no path: write stage:store"),
    "ensemble of a path": ([A, "{name: e, ensemble: {runs: [stage:a, 'run:mlp']}}"],
                           "stage 'e' of 'c.yaml': runs names 'run:mlp', expected stages of this chain, as "
                           "stage:NAME"),
    "ensemble of one": ([A, "{name: e, ensemble: {runs: [stage:a, stage:a]}}"],
                        "stage 'e': runs names a stage twice: a, a"),
    "evaluations": ([A, student("source: digits, view: digits, evaluation: 'digits:train'"),
                     "{name: e, ensemble: {runs: [stage:a, stage:b]}}"],
                    "stage 'e': stages 'a' and 'b' are evaluated on different data (digits:test and "
                    "digits:train): give them the same evaluation"),
    "twice": ([A, A], "'c.yaml' has two stages 'a': give each a name of its own"),
    "two recipes": (["{name: a, train: {student: x}, ensemble: {runs: [a, b]}}"],
                    "stages.0: stage 'a' has train and ensemble, expected one of train, precompute, "
                    "ensemble"),
    "name": ([TRAIN % "a/b"], "stages.0.name: String should match pattern"),
    "no stages": ([], "stages: Tuple should have at least 1 item"),
    "key": (["{name: a, trian: {}}"], "stages.0.trian: unknown key, did you mean 'train'?"),
    # Checkpoints of earlier stages.
    "no checkpoints": ([A, TARGETS % "stage:a@1"],
                       "stage 's': its teacher is 'stage:a@1', but stage 'a' keeps no checkpoints: give it "
                       "keep_checkpoints, the number of epochs between two of them"),
    "another checkpoint": ([PATH, TARGETS % "stage:a@3"],
                           "stage 's': its teacher is 'stage:a@3', but stage 'a' keeps no checkpoint after "
                           "3 epochs: expected @2, @4, or another keep_checkpoints there"),
    "bare checkpoint": ([PATH, TARGETS % "a@2"],
                        "stage 's' of 'c.yaml': teacher names 'a@2', which is a stage and no path: write "
                        "stage:a@2"),
    "all checkpoints": ([PATH, TARGETS % "stage:a@all"],
                        "stage 's' of 'c.yaml': teacher names 'stage:a@all', expected stage:a@EPOCH with a "
                        "number of epochs: give every checkpoint a stage of its own"),
    "checkpoint of a store": ([A, STORE, student("stores: ['stage:store@1']")],
                              "stage 'b' of 'c.yaml': stores names 'stage:store@1', expected stage:store: "
                              "only a teacher can be a checkpoint"),
    "ensemble of checkpoints": ([PATH, "{name: e, ensemble: {runs: ['stage:a@2', 'stage:a@4']}}"],
                                "stage 'e' of 'c.yaml': runs names 'stage:a@2', expected stage:a: only a "
                                "teacher can be a checkpoint"),
    "keep_checkpoints": ([PATH.replace("keep_checkpoints: 2", "keep_checkpoints: 9")],
                         "stage 'a': keep_checkpoints is 9, but the run has 5 epochs, so none would be kept"),
    # Recipes.
    "recipe": ([student("source: digits, view: digits, epoch: 3")],
               "stage 'b': its recipe is not valid:\n  epoch: unknown key, did you mean 'epochs'?"),
    "method": ([A, STORE, student("stores: [stage:store], method: bornagain")],
               "stage 'b': unknown method 'bornagain'. Did you mean 'born-again'?"),
    "network": ([TRAIN % "a", student("source: digits, view: digits").replace("digits-small", "digits-smal")],
                "stage 'b': unknown network 'digits-smal'. Did you mean 'digits-small'?"),
    "source": ([student("source: digitz, view: digits")],
               "stage 'b': unknown source 'digitz'. Did you mean 'digits'?"),
    "stores": ([student("stores: stage:a")],
               "stage 'b': its recipe is not valid:\n  stores: expected a list"),
    "peers": ([student("source: digits, view: digits, method: dml, peers: [digits-small]")],
              "stage 'b': it trains 2 students together, expected one: train groups with `distill train`"),
    "no teacher": ([student("source: digits, view: digits, method: kd")],
                   "stage 'b': method 'kd' needs teachers: give at least one --store"),
    "sequence": ([A, STORE, TARGETS % "stage:a", student("stores: [stage:store, stage:s], method: sequence")],
                 "stage 'b': fusion 'sequence' has 2 teachers, but the run has 1 epoch: give --epochs 2 or "
                 "more, at least one per teacher"),
    "no store": ([student("stores: [no.zarr]")], "stage 'b': there is no store at 'no.zarr'."),
    "view needed": (["{name: s, precompute: {teacher: 'run:mlp', views: 2, source: digits}}"],
                    "stage 's': its teacher is 'run:mlp' and no stage of this chain: give its view"),
    "weights": ([A, "{name: s, precompute: {teacher: stage:a, views: 2, weights: w.pt}}"],
                "stage 's': weights is given, but its teacher is 'stage:a': leave it out"),
    "tap": ([A, "{name: s, precompute: {teacher: stage:a, views: 2, taps: [hiden]}}"],
            "stage 's': unknown layer 'hiden'"),
    "encoding": ([A, "{name: s, precompute: {teacher: stage:a, views: 2, encoding: float61}}"],
                 "stage 's': unknown encoding 'float61'. Did you mean 'float16'?"),
    # Stores that do not belong to the stage, planned or there.
    "other views": ([A, "{name: store, precompute: {teacher: stage:a, view: none, views: 1}}",
                     student("stores: [stage:store], view: digits")],
                    "stage 'b': store 'stage:store' was written with another view recipe than this run's.\n"
                    '  ops[0]           store: -    recipe: {"op":"pad_crop","padding":1}\n'
                    "  reference_size   store: 32   recipe: 8\n"
                    "Leave the view out to use the store's own."),
    "views of two": ([A, STORE, "{name: more, precompute: {teacher: stage:a, views: 2, view_seed: 7}}",
                      student("stores: [stage:store, stage:more]")],
                     "stage 'b': store 'stage:more' was written with another view recipe than this run's.\n"
                     "  seed   store: 7   recipe: 0\n"),
    "views of one there": ([A, STORE, student("stores: [stage:store, plain.zarr]")],
                           "stage 'b': store 'plain.zarr' was written with another view recipe than "
                           "this run's."),
    "other source": ([A, STORE, student("stores: [stage:store], source: 'digits:test'")],
                     "stage 'b': store 'stage:store' was written from source 'digits:train' ("),
    "too few views": ([A, STORE, student("stores: [stage:store], views: 3")],
                      "stage 'b': views is 3, but its stores have 2: leave views out, or give the "
                      "stages that write them views: 3"),
    "needs": ([A, STORE, student("stores: [stage:store], method: fitnets")],
              "stage 'b': method 'fitnets' needs features that stage 'store' does not store: give it "
              "taps: ["),
    "topk": ([A, "{name: store, precompute: {teacher: stage:a, views: 2, encoding: 'topk:2'}}",
              student("stores: [stage:store], method: dtd-flsw")],
             ") needs all logits, but stage 'store' stores only the largest (topk:2): give it encoding: "
             "float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_chains_are_refused_before_anything_runs(beside, monkeypatch, case):
    stages, text = REFUSED[case]
    monkeypatch.chdir(beside)
    Path("c.yaml").write_text(
        "stages:\n" + "".join(f"  - {stage}\n" for stage in stages) if stages else "stages: []"
    )
    before = {path: path.stat().st_mtime_ns for path in beside.rglob("*")}
    result = CliRunner().invoke(distill, ["chain", "c.yaml", "--out", "out", "--device", "cpu"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert text in result.stderr, result.stderr
    assert not result.stdout
    assert {path: path.stat().st_mtime_ns for path in beside.rglob("*")} == before


@pytest.mark.parametrize("method", ["rkd", "at", "simkd"])
def test_a_chain_of_features_is_planned_although_no_store_is_there(beside, monkeypatch, method):
    monkeypatch.chdir(beside)
    tapped = "{name: store, precompute: {teacher: stage:a, views: 2, taps: [layer2, 'layer2:attention']}}"
    stages = [A.replace("digits-small", "digits-resnet"), tapped]
    stages.append(student(f"stores: [stage:store], method: {method}").replace("-small", "-cnn"))
    Path("c.yaml").write_text("stages:\n" + "".join(f"  - {stage}\n" for stage in stages))
    assert len(plan_chain(Path("c.yaml"), Path("out"), device=CPU)) == 3
