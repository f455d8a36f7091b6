"""What a run asks of the machine: threads and algorithms, set once and put back."""

import os
import sys

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe
from click.testing import CliRunner

from coursepack.distill.cli import main as distill
from coursepack.distill.runs.train import train
from coursepack.distill.training.runtime import WORKSPACE, cores, torch_algorithms, torch_threads

TRAIN = sys.modules["coursepack.distill.runs.train"]  # the package's `train` is the function
USABLE = len(os.sched_getaffinity(0))


@pytest.fixture
def seen(monkeypatch):
    """What torch was set to when each epoch began."""
    found = []
    begin = TRAIN._train_epoch

    def spied(*arguments):
        found.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        return begin(*arguments)

    monkeypatch.setattr(TRAIN, "_train_epoch", spied)
    return found


@pytest.mark.parametrize("count", [1, 3])
def test_threads_are_set_for_the_run_alone(tmp_path, seen, count):
    torch.set_num_threads(2)
    train(make_recipe(limit=50), tmp_path / "a", device=CPU, threads=count)
    train(make_recipe(limit=50), tmp_path / "b", device=CPU)
    assert [threads for threads, _ in seen] == [count, 2]
    assert torch.get_num_threads() == 2
    words = ["train", "--student", "digits-small", "--source", "digits", "--view", "digits", "--limit", "50"]
    words += ["--epochs", "1", "--threads", str(count), "--device", "cpu", "--out", str(tmp_path / "c")]
    result = CliRunner().invoke(distill, words)
    assert result.exit_code == 0, result.output
    assert (seen[2][0], torch.get_num_threads()) == (count, 2)


@pytest.mark.parametrize(("ranks", "share"), [(1, USABLE), (2, max(1, USABLE // 2)), (1000, 1)])
def test_ranks_on_one_machine_share_its_cores(monkeypatch, ranks, share):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert cores() == share
    torch.set_num_threads(5)  # as torchrun's OMP_NUM_THREADS=1 would make it one
    with torch_threads(None):
        assert torch.get_num_threads() == share
    with torch_threads(4):
        assert torch.get_num_threads() == 4, "who says how many gets as many"
    assert torch.get_num_threads() == 5


def test_threads_and_algorithms_are_put_back_after_an_error(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    torch.set_num_threads(2)

    def fail():
        with torch_threads(3), torch_algorithms(deterministic=True):
            assert torch.get_num_threads() == 3
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ[WORKSPACE] == ":4096:8"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_algorithms_are_those_of_the_recipe(tmp_path, monkeypatch, seen, before):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    torch.use_deterministic_algorithms(before)
    try:
        for deterministic in (True, False):
            train(
                make_recipe(limit=50, deterministic=deterministic), tmp_path / str(deterministic), device=CPU
            )
            assert torch.are_deterministic_algorithms_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert [deterministic for _, deterministic in seen] == [True, False]
    assert os.environ[WORKSPACE] == ":16:8", "what is set already stays"


def test_training_leaves_torchs_generator_as_it_was(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    train(make_recipe(limit=64), tmp_path / "o", device=CPU)
    assert np.array_equal(torch.rand(3), want)
