"""Wrong input: the text says what, where and what to do; nothing is written; no traceback."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import CPU, make_recipe, write_store, write_teacher
from click.testing import CliRunner

from coursepack.data import open_source
from coursepack.distill.cli import main as distill
from coursepack.distill.methods import METHODS
from coursepack.distill.runs.train import train
from coursepack.errors import UnknownName
from coursepack.precompute.cli import main as precompute

AS = "distill train --source digits --view digits --epochs 1 --out new --student"
ALONE = f"{AS} digits-small"
KD = "distill train --student digits-small --epochs 1 --out new"
WRITE = "precompute run --teacher run:mlp --source digits --view digits --views 2 --store new.zarr"
FILES = {
    "unknown.yaml": "student: digits-small\nsource: digits\nview: digits\nepoch: 3\n",
    "many.yaml": "student: 3\nepochs: 0\nobjective: {temprature: 2}\noptimizer: {lr: fast}\nview: {sed: 1}\n",
    "broken.yaml": "student: [digits\n",
    "list.yaml": "- student\n",
    "empty.yaml": "",
    "number.yaml": "student: digits-small\nsource: digits\nview: digits\nobjective: 3\n",
    "path.yaml": "student: digits-small\nstores: s.zarr\n",
    "view.yaml": "ops: [{op: pad_crop, padding: 0}]\nsed: 1\n",
    "classes.yaml": "[0, 1, 2, 3, 4, 5, 6, 7, 8, 12]",
    "notes/a.txt": "mine",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with everything that can be confused."""
    folder = tmp_path_factory.mktemp("work")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x80")
    mlp = write_teacher(folder / "mlp", seed=1)
    write_teacher(folder / "seven", classes=7)
    store = write_store(folder / "s.zarr", mlp)
    write_store(folder / "plain.zarr", mlp, view="none", views=1)
    write_store(folder / "started.zarr", mlp, order=iter([]))
    shutil.copytree(store, folder / "bare.zarr")
    (folder / "bare.zarr" / "manifest.json").unlink()
    digits = open_source("digits")
    images = digits.images.copy()
    images[0, 0, 0, 0] += 1
    write_store(folder / "changed.zarr", mlp, source=replace(digits, images=images))
    train(make_recipe(limit=50), folder / "run", device=CPU)
    return folder


def listing(folder):
    """Every file and folder with what changes when it is written to."""
    facts = {path: path.stat() for path in sorted(folder.rglob("*"))}
    return {str(path): (fact.st_size, fact.st_mtime_ns) for path, fact in facts.items()}


def refuse(workplace, monkeypatch, line):
    """Run a line that must fail without a trace; returns its exit status and what it said."""
    monkeypatch.chdir(workplace)
    before = listing(workplace)
    command, *words = shlex.split(line)
    result = CliRunner().invoke({"distill": distill, "precompute": precompute}[command], words)
    assert isinstance(result.exception, SystemExit), f"not an error message: {result.exception!r}"
    assert listing(workplace) == before, "a refused command wrote something"
    assert result.stdout == ""
    return result.exit_code, result.stderr


DOMAIN = [
    # What is not there.
    (f"{KD} --store no.zarr",
     "there is no store at 'no.zarr'. Make one with `precompute run ... --store no.zarr`."),
    (f"{KD} --store bare.zarr",
     "'bare.zarr' has no manifest.json: it is not a coursepack store, or writing it stopped at once. Run "
     "the same `precompute run` again."),
    (f"{KD} --store started.zarr",
     "store 'started.zarr' has committed none of its 2 views. Run the same `precompute run` again; it "
     "goes on where it stopped."),
    ("distill eval no", "there is no run at 'no'. Make one with `distill train ... --out no`."),
    ("distill eval notes", "there is no run at 'notes'."),
    ("distill compare run no", "there is no run at 'no'."),
    ("precompute status --store no.zarr", "there is no store at 'no.zarr'."),
    ("precompute verify --store no.zarr", "there is no store at 'no.zarr'."),
    # Stores that do not belong together, or to this run.
    (f"{KD} --store s.zarr --store plain.zarr",
     "stores 's.zarr' and 'plain.zarr' do not belong together: their teachers saw different pixels.\n  "
     'view.ops[0]           s.zarr: {"op":"pad_crop","padding":1}   plain.zarr: -\n  '
     "view.reference_size   s.zarr: 8                               plain.zarr: 32\nUse stores of one "
     "source and one view recipe."),
    (f"{KD} --store s.zarr --store s.zarr --store plain.zarr",
     "stores 's.zarr' and 'plain.zarr' do not belong together"),
    (f"{KD} --store s.zarr --store changed.zarr",
     "do not belong together: their teachers saw different pixels.\n  source.fingerprint   s.zarr: "
     "2b5afb03b7a9"),
    (f"{KD} --store changed.zarr",
     "store 'changed.zarr' was written from source 'digits:train' (\\w{12}), but 'digits:train' here is "
     "\\w{12}: train on the source that the teachers saw"),
    (f"{KD} --store s.zarr --source digits:test",
     "store 's.zarr' was written from source 'digits:train' (\\w{12}), but 'digits:test' here is \\w{12}: "
     "train on the source that the teachers saw"),
    (f"{KD} --store s.zarr --view none",
     "store 's.zarr' was written with another view recipe than this run's.\n  ops[0]           store: "
     '{"op":"pad_crop","padding":1}   recipe: -\n  reference_size   store: 8    '),
    (f"{KD} --store s.zarr --views 3",
     "views is 3, but the stores have 2 views in common: leave --views out, or add views with `precompute "
     "run ... --views 3`"),
    (f"{KD} --store s.zarr --teacher-weights 1,2",
     "fusion.weights has 2 numbers, expected 1: one per store"),
    (f"{KD} --store s.zarr --teacher-weights -1",
     "objective.fusion.weights.0: expected at least 0, got -1.0"),
    (f"{KD} --store s.zarr --method supervised",
     "method 'supervised' does not use teachers, but --store s.zarr is given: leave --store out, "
     "give the stores a share of the loss with --soft-weight 0.9, or choose a method that learns from them, "
     "as --method kd"),
    (f"{ALONE} --method kd", "method 'kd' needs teachers: give at least one --store"),
    (f"{ALONE} --online", "--online runs the teachers of stores live: give at least one --store"),
    # Names.
    (f"{ALONE} --method kdd", "unknown method 'kdd'. Did you mean 'kd'? Known: supervised, kd"),
    (f"{AS} digits-smal", "unknown network 'digits-smal'. Did you mean 'digits-small'? Known: "),
    (f"{AS} torchvision:resnet5",
     "unknown torchvision network 'resnet5'. Did you mean 'resnet50'? "),
    (f"{AS} run:mlp", "network 'run:mlp' is already trained, expected a network to train"),
    (f"{ALONE} --source digit", "unknown source 'digit'. Did you mean 'digits'? Known: digits"),
    (f"{ALONE} --source digits:tset",
     "unknown split of source 'digits' 'tset'. Did you mean 'test'? Known: train, "),
    (f"{ALONE} --view digit", "unknown view 'digit'. Did you mean 'digits'? Known: none, eval, digits"),
    (f"{ALONE} --set evaluation=digits:tes", "unknown split of source 'digits' 'tes'. Did you mean 'test'?"),
    ("distill eval run --source digits:tes", "unknown split of source 'digits' 'tes'. Did you mean 'test'?"),
    # Numbers.
    (f"{ALONE} --limit 1443", "limit is 1443, but source 'digits:train' has 1442 samples"),
    (f"{ALONE} --lr nan", "optimizer.lr: expected a finite number, got nan"),
    (f"{ALONE} --lr-schedule step",
     "the recipe is not valid:\n  optimizer.schedule: milestones are [], but shape is 'step': "
     "milestones are for shape 'step', which needs at least one"),
    (f"{ALONE} --milestones 3,5", "milestones are [3, 5], but shape is 'constant'"),
    (f"{ALONE} --lr-schedule step --milestones 2.5",
     "optimizer.schedule.milestones.0: expected an integer"),
    (f"{ALONE} --lr-schedule one_cycle --warmup-epochs 1",
     "warmup_epochs is 1, but shape 'one_cycle' has its own warm-up"),
    (f"{ALONE} --lr-schedule step --milestones 1,5 --epochs 5",
     "optimizer.schedule.milestones are [1, 5], but the run ends after epoch 4, so the learning rate would "
     "never fall at 5: give --milestones below 5, or more --epochs"),
    (f"{ALONE} --warmup-epochs 1.5",
     "optimizer.schedule.warmup_epochs is 1.5, but the run has 1 epochs, so the learning rate would never "
     "reach lr: give --warmup-epochs up to 1, or more --epochs"),
    (f"{KD} --store s.zarr --set objective.divergence=klx",
     "the recipe is not valid:\n  objective.divergence: expected 'kl', 'reverse_kl', 'js' or 'mse', "
     "got 'klx'"),
    (f"{KD} --store s.zarr --method ka-lsr --set objective.divergence=mse",
     "adjustment 'smooth' returns probabilities, but divergence 'mse' compares logits: choose another"),
    (f"{KD} --store s.zarr --method dtd-cwsm --temperature 30",
     "temperature (T_0) is 30, expected dynamic_temperature.lowest to highest (1 to 20), within which each"),
    (f"{KD} --store s.zarr --method dtd-flsw --set objective.dynamic_temperature.lowest=12",
     "temperature (T_0) is 10, expected dynamic_temperature.lowest to highest (12 to 20)"),
    (f"{KD} --store s.zarr --set objective.fusion.layer=conv2",
     "objective.fusion.layer: unknown key"),
    (f"{KD} --store s.zarr --method best --set objective.fusion.joint_epochs=3",
     "objective.fusion.joint_epochs: unknown key"),
    (f"{KD} --store s.zarr --method amtml --set objective.fusion.teacher=0",
     "objective.fusion.teacher: unknown key"),
    (f"{KD} --store s.zarr --set objective.fusion.l2=0.5",
     "the recipe has keys that were renamed:\n  objective.fusion.l2: now objective.terms.latents.weight"),
    (f"{ALONE} --set optimiser.lr=1", "optimiser: now optimizer"),
    (f"{ALONE} --set evaluation=fake,classes=9,size=8,channels=1:test",
     "evaluation 'fake,classes=9,size=8,channels=1:test' has 9 classes, but source 'digits:train' has 10: "
     "evaluate on a split of the same data"),
    (f"{ALONE} --set optimizer.betas=[0.9,1]", "optimizer.betas.1: expected less than 1, got 1"),
    (f"{ALONE} --set optimizer.nestrov=true", "optimizer.nestrov: unknown key, did you mean 'nesterov'?"),
    (f"{ALONE} --accumulate 65", "accumulate is 65, but batch_size is 64: a micro-batch needs at least one"),
    (f"{KD} --store s.zarr --method dtd-flsw --accumulate 2",
     "accumulate is 2, but method 'dtd-flsw' relates all samples of a batch (dynamic_temperature): leave "
     "accumulate out, or choose a smaller batch_size"),
    (f"{KD} --store s.zarr --method amtml --compile",
     "compile is set, but method 'amtml' reads layers of the student (fusion 'adaptive'), which "
     "torch.compile does not support: leave compile out"),
    (f"{ALONE} --views 3 --views-per-load 2 --view-order shuffled",
     "views_per_load is 2, but the run has 3 views in shuffled order: an epoch that ends one round and "
     "begins the next might hold a view of a sample twice. Give a number that divides 3, or leave "
     "view_order out"),
    (f"{ALONE} --out run --resume --lr 0.1",
     "run 'run' cannot be resumed, since it was started with other values.\n  "),
    (f"{ALONE} --out notes --resume", "'notes' is not empty and not a run: choose another --out"),
    (f"{ALONE} --set student_size=9", "student 'digits-small' cannot take views of 9 x 9 pixels: "),
    (f"{ALONE} --student-size 9", "student 'digits-small' cannot take views of 9 x 9 pixels: "),
    (f"{KD} --store s.zarr --method amtml --student-size 9",
     "student 'digits-small' cannot take views of 9 x 9 pixels: "),
    (f"{AS} torchvision:vit_b_16 --student-size 40",
     "network 'torchvision:vit_b_16' cannot be built for 40 x 40 pixels: Input shape indivisible by patch "
     "size!. Choose another size"),
    (f"{ALONE} --student-mean 0.5,0.5,0.5 --student-std 0.2,0.2,0.2",
     "the network reads 1 channels, but mean and std are given for 3: give one value per channel"),
    (f"{ALONE} --student-mean 0.5,0.5",
     "mean has 2 values and std 1, expected 1 or 3 of each, one per channel"),
    (f"{ALONE} --student-std 0",
     "the preprocessing is not valid:\n  std.0: expected more than 0, got 0.0"),
    (f"{ALONE} --student-mean nan", "student_mean.0: expected a finite number, got nan"),
    # Recipes.
    ("distill train no.yaml --out new", "cannot read 'no.yaml': No such file or directory"),
    ("distill train unknown.yaml --out new",
     "unknown.yaml is not valid:\n  epoch: unknown key, did you mean 'epochs'?\n"),
    ("distill train many.yaml --out new",
     "many.yaml is not valid:\n  student: expected text, got 3\n  objective.temprature: "
     "unknown key, did you mean 'temperature'?\n  view.sed: unknown key, did you mean 'seed'?\n  epochs: "
     "expected at least 1, got 0\n  optimizer.lr: expected a number, got 'fast'\n"),
    ("distill train broken.yaml --out new",
     '\'broken.yaml\' is not YAML: while parsing a flow sequence\n  in "<unicode string>", line 1, column '
     "10"),
    ("distill train bytes.yaml --out new", "'bytes.yaml' is not YAML: it is not text"),
    ("distill train list.yaml --out new", "'list.yaml' holds a list, expected a mapping of recipe fields"),
    ("distill train empty.yaml --out new", "'empty.yaml' holds nothing, expected a mapping of recipe fields"),
    ("distill train number.yaml --out new",
     "number.yaml is not valid:\n  objective: expected a mapping, got 3"),
    ("distill train number.yaml --temperature 2 --out new",
     "--temperature: 'objective' is 3, not a group of fields"),
    ("distill train path.yaml --out new",
     "path.yaml is not valid:\n  stores: expected a list, got 's.zarr'"),
    (f"{ALONE} --view view.yaml",
     "view recipe 'view.yaml' is not valid:\n  ops.0.padding: expected at least 1, got 0\n  sed: unknown "
     "key, did you mean 'seed'?"),
    (f"{ALONE} --set epochs", "--set 'epochs' is not key=value"),
    (f"{ALONE} --set =3", "--set '=3' is not key=value"),
    (f"{ALONE} --set 'epochs=[1'", "--set 'epochs=[1': the value is not YAML"),
    (f"{ALONE} --set epochs=0",
     "the recipe is not valid:\n  epochs: expected at least 1, got 0"),
    (f"{ALONE} --set epochs.x=1", "--set 'epochs.x=1': 'epochs' is 1, not a group of fields"),
    (f"{ALONE} --set method=[1]", "method: expected text, got [1]"),
    (f"{ALONE} --set source=null", "source: expected text, got null"),
    ("distill train --out new", "there is no student: give --student NAME, or a recipe file"),
    (KD, "there is nothing to train on: give --source NAME[:SPLIT], or --store"),
    (f"{KD} --source digits", "there is no view recipe: give --view NAME (none, "),
    # Where to write.
    (f"{ALONE} --out run",
     "'run' already holds a run: choose another --out, continue it with --resume, or remove it "
     "(`distill train` has --overwrite)"),
    (f"{ALONE} --out notes", "'notes' is not empty and not a run: choose another --out"),
    (f"{ALONE} --out notes --overwrite", "'notes' is not empty and not a run: choose another --out"),
    (f"{ALONE} --out list.yaml",
     "'list.yaml' is a file, expected a folder for the run: choose another --out"),
    (f"{ALONE} --out list.yaml/run",
     "cannot create the run's folder 'list.yaml/run': Not a directory. Choose another"),
    (f"{ALONE} --out /proc/run",
     "cannot create the run's folder '/proc/run': No such file or directory. Choose"),
    # Teachers.
    (f"{WRITE} --teacher run:seven",
     "teacher 'run:seven' has 7 classes, but the source has 10 (0, 1, 2, ...): use a teacher "
     "trained on the source's classes"),
    (f"{WRITE} --teacher run:no", "there is no run at 'no'. Make one with `distill train --out no`."),
    (f"{WRITE} --teacher run:notes", "run 'notes' has no trained weights: it is unfinished or not a run"),
    (f"{WRITE} --teacher digits-mlp", "teacher 'digits-mlp' has no weights: give --weights FILE"),
    (f"{WRITE} --teacher digits-cnn --weights mlp/student.safetensors",
     "weights 'mlp/student.safetensors' are not of network 'digits-cnn': missing ["),
    (f"{WRITE} --mean 0.5,0.5,0.5 --std 0.2,0.2,0.2",
     "the network reads 1 channels, but mean and std are given for 3: give one value per channel"),
    (f"{WRITE} --mean 0.5,0.5", "mean has 2 values and std 1, expected 1 or 3 of each, one per channel"),
    (f"{WRITE} --std 0", "the preprocessing is not valid:\n  std.0: expected more than 0, got 0.0"),
    (f"{WRITE} --tap hiden1",
     "unknown layer 'hiden1'. Did you mean 'hidden1'? Known: hidden1, hidden2, head"),
    (f"{WRITE} --tap hidden1:mean",
     "unknown reduction 'mean'. Known: map, pooled, attention, gram, sign, "
     "margin, sketch."),
    (f"{WRITE} --tap hidden1:map:0",
     "tap 'hidden1:map:0' is not LAYER[:REDUCTION[:SIZE]], as in layer3:attention:8"),
    (f"{WRITE} --tap hidden1+hidden2", "tap 'hidden1+hidden2' names 2 layers: only `gram` takes two"),
    (f"{WRITE} --tap hidden1:pooled", "tap 'hidden1@pooled': pooled needs feature maps (N, C, H, W), got ("),
    (f"{WRITE} --tap hidden1:margin",
     "tap 'hidden1@margin' needs a batch normalization with weight and bias, but layer 'hidden1' is a "
     "Linear: tap the one before the activation"),
    (f"{WRITE} --encoding float17", "unknown encoding 'float17'. Did you mean 'float16'? Known: float32, "),
    (f"{WRITE} --encoding topk",
     "encoding 'topk' has no number of entries to keep, expected topk:K such as topk:10"),
    (f"{WRITE} --encoding bits", "unknown encoding 'bits'."),
    (f"{WRITE} --tap hidden1 --feature-encoding topk:3", "unknown encoding 'topk'."),
    (f"{WRITE} --classes no.yaml", "cannot read 'no.yaml': No such file or directory"),
    (f"{WRITE} --classes list.yaml", "class map 'list.yaml' holds 1 entries, expected 10 class ids"),
    (f"{WRITE} --classes classes.yaml",
     "--classes names class 12, but teacher 'run:mlp' has classes 0..9"),
    (f"{WRITE} --store s.zarr --view-seed 1",
     "store 's.zarr' was written by another recipe.\n  view.fingerprint"),
]  # fmt: skip

USAGE = [
    (f"{ALONE} --temperature 0", "'--temperature': 0.0 is not in the range 0<x<=100"),
    (f"{ALONE} --temperature 101", "'--temperature': 101.0 is not in the range 0<x<=100"),
    (f"{ALONE} --epochs 0", "'--epochs': 0 is not in the range x>=1"),
    (f"{ALONE} --lr 0", "'--lr': 0.0 is not in the range x>0"),
    (f"{ALONE} --limit 0", "'--limit': 0 is not in the range x>=1"),
    (f"{ALONE} --momentum 1", "'--momentum': 1.0 is not in the range 0<=x<1"),
    (f"{ALONE} --weight-decay -1", "'--weight-decay': -1.0 is not in the range x>=0"),
    (f"{ALONE} --batch-size 0", "'--batch-size': 0 is not in the range x>=1"),
    (f"{ALONE} --optimizer adam", "'--optimizer': 'adam' is not one of 'sgd', 'adamw'."),
    (f"{ALONE} --lr-schedule linear", "'linear' is not one of 'constant', 'step', 'cosine', 'one_cycle'."),
    (f"{ALONE} --milestones 1,x", "'--milestones': '1,x' is not comma-separated numbers"),
    (f"{ALONE} --warmup-epochs -1", "'--warmup-epochs': -1.0 is not in the range x>=0"),
    (f"{ALONE} --clip 0", "'--clip': 0.0 is not in the range x>0"),
    (f"{ALONE} --ema 1", "'--ema': 1.0 is not in the range 0<x<1"),
    (f"{ALONE} --label-smoothing 1", "'--label-smoothing': 1.0 is not in the range 0<=x<1"),
    (f"{ALONE} --accumulate 0", "'--accumulate': 0 is not in the range x>=1"),
    (f"{ALONE} --patience 0", "'--patience': 0 is not in the range x>=1"),
    (f"{ALONE} --evaluate-every 0", "'--evaluate-every': 0 is not in the range x>=1"),
    (f"{ALONE} --precision float64", "'float64' is not one of 'float32', 'bfloat16', 'float16'."),
    (f"{ALONE} --view-order random", "'random' is not one of 'cyclic', 'shuffled'."),
    (f"{ALONE} --threads 0", "'--threads': 0 is not in the range x>=1"),
    (f"{ALONE} --checkpoint-seconds -1", "'--checkpoint-seconds': -1.0 is not in the range x>=0"),
    (f"{ALONE} --views 0", "'--views': 0 is not in the range x>=1"),
    (f"{ALONE} --seed -1", "'--seed': -1 is not in the range 0<=x<"),
    (f"{ALONE} --hard-weight -1", "'--hard-weight': -1.0 is not in the range x>=0"),
    (f"{ALONE} --teacher-weights 1,x", "'1,x' is not comma-separated numbers, as in 0.5,0.3,0.2"),
    ("distill train --student digits-small", "Missing option '--out'"),
    ("distill trian", "No such command 'trian'"),
    (f"{WRITE} --views 0", "'--views': 0 is not in the range x>=1"),
    (f"{WRITE} --part 2/2", "'2/2' is not I/COUNT with 0 <= I < COUNT, as in 0/2 and 1/2"),
]


@pytest.mark.parametrize(("line", "text"), DOMAIN)
def test_domain_errors(workplace, monkeypatch, line, text):
    status, said = refuse(workplace, monkeypatch, line)
    assert status == 1
    assert said.startswith("Error: ")
    # Fingerprints are the only thing that a text is not exact about.
    pattern = re.escape(text).replace(r"\\w\{12\}", r"\w{12}")
    assert re.search(pattern, said), said


@pytest.mark.parametrize(("line", "text"), USAGE)
def test_usage_errors(workplace, monkeypatch, line, text):
    status, said = refuse(workplace, monkeypatch, line)
    assert status == 2
    assert text in said
    assert "--help' for help." in said


def test_cuda_without_cuda(workplace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for line in (ALONE, WRITE, "distill eval run"):
        status, said = refuse(workplace, monkeypatch, f"{line} --device cuda")
        assert status == 1
        assert said == "Error: device is 'cuda', but torch sees no CUDA device: use --device cpu\n"


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        (f"{KD} --method kdd", 1, f"Error: {UnknownName('method', 'kdd', METHODS)}\n"),
        ("precompute run --teacher run:mlp", 2, "Usage: precompute run [OPTIONS] [TEACHERS.yaml]\n"
         "Try 'precompute run --help' for help.\n\nError: Missing option '--source'.\n"),
    ],
)  # fmt: skip
def test_installed_commands(workplace, line, status, text):
    before = listing(workplace)
    command, *words = shlex.split(line)
    script = Path(sys.executable).parent / command
    result = subprocess.run([script, *words], cwd=workplace, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", text)
    assert listing(workplace) == before
