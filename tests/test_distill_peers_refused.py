"""Groups of students that are refused on the command line: one line that says what to do, and no folder."""

import pytest
from builders import write_teacher
from click.testing import CliRunner

from coursepack.distill.cli import main

DIGITS = ("--source", "digits", "--view", "digits", "--limit", "100", "--epochs", "1")
IMAGES = ("--source", "fake,samples=40", "--view", "none", "--epochs", "1")


def train(*words):
    return CliRunner().invoke(main, ["train", *map(str, words), "--device", "cpu"])


def refusal(out, *words):
    """What a command says that must fail before it writes anything."""
    result = train(*words, "--out", out)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), f"not an error message: {result.exception!r}"
    assert not out.exists()
    assert result.stdout == ""
    return result.stderr.strip()


def test_one_student_is_no_group(tmp_path):
    assert refusal(tmp_path / "o", "--student", "digits-small", *DIGITS, "--method", "dml") == (
        "Error: method 'dml' trains students that learn from each other (exchange 'outputs'), expected 2 or "
        "more of them, got 1: repeat --student NAME, or give --peers N for N students of one network"
    )


def test_attention_needs_two_peers(tmp_path):
    words = ["--student", "digits-small", "--peers", 2, *DIGITS, "--method", "okddip"]
    assert "(exchange 'attention'), expected 3 or more of them, got 2" in refusal(tmp_path / "o", *words)


def test_a_peer_of_other_classes(tmp_path):
    five = write_teacher(tmp_path / "five", classes=5)
    words = ["--student", "digits-small", "--student", f"run:{five}", *DIGITS, "--method", "dml"]
    assert refusal(tmp_path / "o", *words) == (
        f"Error: peer 'run:{five}' has 5 classes, but the source has 10: students that learn from each other "
        "have the same classes, so name a run that was trained on them, or a network"
    )


def test_a_peer_from_a_run_that_does_not_exist(tmp_path):
    words = ["--student", "digits-small", "--student", f"run:{tmp_path / 'no'}", *DIGITS, "--method", "let"]
    assert refusal(tmp_path / "o", *words).startswith(f"Error: there is no run at '{tmp_path / 'no'}'.")


def test_maps_that_do_not_fit(tmp_path):
    words = ["--student", "resnet8", "--student", "vgg8", *IMAGES, "--method", "ffl"]
    assert refusal(tmp_path / "o", *words) == (
        "Error: exchange 'feature_fusion' joins the students' last maps, which are 64 x 8 x 8, 512 x 4 x 4 "
        "(C x H x W), expected one height and width: choose networks of one kind, or --method one, which "
        "reads embeddings"
    )


def test_a_student_without_maps(tmp_path):
    words = ["--student", "digits-cnn", "--student", "digits-small", *DIGITS, "--method", "afd"]
    assert refusal(tmp_path / "o", *words) == (
        "Error: student 'digits-small' has no block that gives maps (C, H, W), which the exchange reads: "
        "choose a convolutional network, or --method dml, which reads logits alone"
    )


def test_the_group_of_another_recipe(tmp_path):
    words = ["--student", "digits-small", *DIGITS, "--method", "codistillation", "--group", tmp_path / "g"]
    first = train(*words, "--replica", "1/2", "--out", tmp_path / "r1")
    assert first.exit_code == 0, first.output
    others = [*words, "--replica", "2/2", "--batch-size", 16, "--hard-weight", 0.5]
    assert refusal(tmp_path / "r2", *others) == (
        f"Error: group '{tmp_path / 'g'}' is of other replicas.\n"
        "  recipe.batch_size              group: 64    this run: 16\n"
        "  recipe.objective.hard_weight   group: 1.0   this run: 0.5\n"
        "Train with the values of the group, or give another --group."
    )
    assert not (tmp_path / "g" / "replica-2.safetensors").exists()


@pytest.mark.parametrize("text", ["4/3", "0/3"])
def test_a_replica_beyond_their_number(tmp_path, text):
    words = ["--student", "digits-small", *DIGITS, "--method", "codistillation", "--replica", text]
    assert refusal(tmp_path / "o", *words, "--group", tmp_path / "g") == (
        f"Error: --replica is '{text}', expected I/N with I from 1 to N, and N of at least 2, such as 1/3"
    )
    assert not (tmp_path / "g").exists()
