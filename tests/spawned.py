"""What tests run in a process of their own; it has to be importable there by name."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from moments import with_variables
from torch import nn

import coursepack
from coursepack.distill import Learner, Objective, TrainRecipe, distributed
from coursepack.distill.cli import main as distill
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import Loss, Needs, TermConfig
from coursepack.distill.runs.chain import stages
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.evaluate import evaluate
from coursepack.distill.training.group import make_group
from coursepack.distill.training.loop import train_steps
from coursepack.distill.training.metrics import EpochMetrics
from coursepack.distill.training.state import state_of
from coursepack.errors import RunError
from coursepack.models import Network, Preprocessing
from coursepack.models.networks import NETWORKS, NetworkKind
from coursepack.precompute.cli import main as precompute

FORKED = multiprocessing.get_context("forkserver")
"""Processes forked from one that has imported what takes long, and has no thread or device of the tests'."""
FORKED.set_forkserver_preload(
    [
        *(module.name for module in pkgutil.walk_packages(coursepack.__path__, "coursepack.")),
        *("sklearn.datasets", "torch._dynamo", "torch.distributed.run", "zarr"),
    ]
)


def told(source):
    """What a source says of itself."""
    samples = np.arange(len(source.labels))
    pixels = [image.sum() for image in source.pixels(samples)]
    return source.fingerprint, source.contents(samples).tolist(), pixels


def tell_all(sources, queue):
    """Put what every source says of itself into a queue."""
    for source in sources:
        queue.put(told(source))


class Dropping(nn.Module):
    """A student that draws in training."""

    def __init__(self, classes):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, classes)

    def forward(self, images):
        return self.head(F.dropout(F.relu(self.hidden(images.flatten(1))), 0.5, self.training))


DROPPING = NetworkKind(Dropping, NETWORKS["digits-small"].preprocessing)


# Commands, in processes that import nothing again.


def code(words):
    """What `python -c` does."""
    sys.argv = ["-c", *words[1:]]
    exec(words[0], {"__name__": "__main__"})


def script(words):
    """What `python FILE` does."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def torchrun(words):
    """`torchrun`, whose ranks run a file, and are forked too."""
    from torch.distributed.run import main

    main(["--start-method", "fork", "--run-path", *words])


COMMANDS = {
    "distill": distill,
    "precompute": precompute,
    "code": code,
    "script": script,
    "torchrun": torchrun,
}


def as_command(words, folder, before):
    """Be one of these commands; what it prints goes to files of a folder."""
    gc.freeze()  # what was imported before: looking through it would copy all of its memory
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), descriptor)
    # Where tests run in the background, SIGINT is ignored, and so it would be here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    NETWORKS["dropping"] = DROPPING
    if words[0] in ("distill", "script"):
        warnings.simplefilter("error")
    if before is not None:
        before()
    COMMANDS[words[0]](words[1:])


@contextmanager
def running(*words, before=None):
    """A command in a process of its own, which calls `before` first: the process, and a wait for its end."""
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name, stream) for stream in ("out", "err")]
        for file in files:
            file.touch()
        process = FORKED.Process(target=as_command, args=(words, Path(name), before))
        process.start()

        def finished(seconds=300):
            process.join(seconds)
            assert process.exitcode is not None, f"{words} takes longer than {seconds} s"
            return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))

        try:
            yield process, finished
        finally:
            process.kill()
            process.join()


def run(*words, before=None):
    """Run a command in a process of its own to its end."""
    with running(*words, before=before) as (_, finished):
        return finished()


@contextmanager
def stage_process(words, env, **_):
    """`subprocess.Popen` of a chain's stage that precomputes, for a process that imports nothing again."""
    program, option, _, *words = words
    assert (program, option) == (sys.executable, "-c")
    done = run("precompute", *words, before=partial(with_variables, env))
    print(done.stderr, end="", file=sys.__stderr__)  # where a process of its own writes
    yield SimpleNamespace(wait=lambda: done.returncode)


def fork_stages(monkeypatch):
    """Fork the processes of chains that run in this process."""
    streams = {"PIPE": subprocess.PIPE, "DEVNULL": subprocess.DEVNULL}
    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(Popen=stage_process, **streams))


# Ranks: what each of several processes does, given who it is.


def as_rank(index, count, port, work, arguments, queue):
    """Be one of several ranks; put (index, what the work told or raised) into a queue."""
    gc.freeze()
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    os.environ |= {"RANK": str(index), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.EXIT_DELAY_SECONDS = 0.1
    try:
        with distributed.process_group("cpu") as (us, device):
            assert (us.index, us.count, us.local_count, device.type) == (index, count, count, "cpu")
            queue.put((index, work(us, *arguments)))
    except BaseException as error:
        queue.put((index, error))


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def on_ranks(count, work, *arguments):
    """What `work(ranks, *arguments)` tells, or raises, on each of several ranks."""
    port = free_port()
    queue = FORKED.SimpleQueue()
    processes = [
        FORKED.Process(target=as_rank, args=(index, count, port, work, arguments, queue))
        for index in range(count)
    ]
    for process in processes:
        process.start()
    told = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [told[index] for index in range(count)]


class PairsConfig(TermConfig):
    """Numbers of the term below."""

    term: Literal["pairs"] = "pairs"


class Pairs(torch.nn.Module):
    """A term that is coupled over the batch: how unlike its rows the student's logits are."""

    def forward(self, inputs):
        """A scalar."""
        return torch.cdist(inputs.student.logits, inputs.student.logits).square().mean()


PAIRS = Loss(PairsConfig, "", "", lambda _: Needs(whole_batch=("pairs",)), lambda *_: Pairs())


def one_epoch(us, recipes):
    """For each recipe: what an epoch tells, every step's gradients, the last state, and an evaluation."""
    with mock.patch.dict(LOSSES, {"pairs": PAIRS}):
        return [_one_epoch(us, recipe) for recipe in recipes]


def _one_epoch(us, recipe):
    recipe = dict(recipe)
    with_pairs = recipe.pop("with_pairs", False)
    recipe = TrainRecipe.model_validate(recipe)
    if with_pairs:
        objective = recipe.objective.model_copy(update={"terms": {"pairs": PairsConfig()}})
        recipe = recipe.model_copy(update={"objective": objective})
    run = prepare(recipe, torch.device("cpu"), us)
    group, gradients = make_group(run), []
    for state in group:
        state.broadcast_weights()
    together = torch.nn.ModuleList(state.learner for state in group) if len(group) > 1 else group[0].learner

    logs = [EpochMetrics(max(1, len(run.readers)), us) for _ in group]
    for _ in train_steps([group], run.batches(0), run.targets, logs, micro_batches=recipe.accumulate):
        values = together.named_parameters()
        gradients.append({name: v.grad.numpy().copy() for name, v in values if v.grad is not None})
    told = [log.means() for log in logs]
    values = {name: value.numpy().copy() for name, value in together.state_dict().items()}
    average = group[0].average
    if average is not None:
        values |= {f"average.{name}": value.numpy().copy() for name, value in average.state_dict().items()}
    facts = [evaluate(state.network, run.evaluation, run.device, ranks=us) for state in group]
    if len(group) == 1:
        (told,), (facts,) = told, facts
    return {"told": told, "gradients": gradients, "state": values, "evaluation": facts}


class Noisy(torch.nn.Module):
    """A student that notes what it draws."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.drawn = []

    def forward(self, images):
        self.drawn.append(torch.rand(4).tolist())
        return self.layer(images.flatten(1))


def drawn(us, recipe):
    """What a student draws in each of the parts of an epoch's steps."""
    run = prepare(TrainRecipe.model_validate(recipe), torch.device("cpu"), us)
    network = Network("noisy", Noisy(), Preprocessing(size=8, mean=(0.0,), std=(1.0,)), 10)
    learner = Learner(network, Objective(run.recipe.objective), ranks=us)
    state, log = state_of(learner, run.recipe, 1), EpochMetrics(1, us)
    for _ in train_steps([[state]], run.batches(0), None, [log], micro_batches=run.recipe.accumulate):
        pass
    return network.module.drawn


def resumed(us, recipe, folders):
    """What a run tells that each rank resumes in a folder of its own."""
    how = {"device": torch.device("cpu"), "resume": True, "checkpoint_seconds": 0.05}
    return train(TrainRecipe.model_validate(recipe), folders[us.index], ranks=us, **how)


def fails_on_one(us, index):
    """One rank fails; the others wait for it."""
    if us.index == index:
        raise RunError("only here")
    us.all_gather(None)


def fails_on_all(us):
    """Every rank fails alike."""
    raise RunError("everywhere")


def vanishes(us, index):
    """One rank ends without a word; the others wait for it."""
    if us.index != index:
        time.sleep(0.5)
        us.all_gather(None)
    return "gone"


def talks(us):
    """What the functions of ranks give."""
    buffers = [
        torch.full((3,), us.index, dtype=torch.bool),
        torch.tensor(0.1 + us.index, dtype=torch.float64),
        torch.full((2, 2), us.index, dtype=torch.int64),
        torch.full((1, 2, 2, 2), 0.1 + us.index).to(memory_format=torch.channels_last),
    ]
    us.broadcast_tensors(buffers)
    return {
        "gathered": us.all_gather(("it", us.index)),
        "first": us.broadcast_flag(us.is_first),
        "summed": us.all_reduce_sum(torch.tensor([1.0, us.index])).tolist(),
        "buffers": [value.tolist() for value in buffers],
    }
