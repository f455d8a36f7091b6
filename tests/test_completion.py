"""Completion in real shells: a line is typed on a terminal, with the Tab key at its end."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coursepack.completion import Bash
from coursepack.models.taps import KNOWN_REDUCTIONS, SKETCH
from coursepack.precompute.cli import main as precompute

BIN = Path(sys.executable).parent
SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
ADDED = (
    'eval "$(_DISTILL_COMPLETE={shell}_source distill)"; '
    'eval "$(_PRECOMPUTE_COMPLETE={shell}_source precompute)"'
)
"""What docs/commands.md adds to a shell's startup file."""
SETUP = {
    "bash": "",
    "zsh": "autoload -Uz compinit && compinit -u -D; ",
}
LINES = {
    "distill tra": "distill train",
    "distill train --optimi": "--optimizer",
    "distill train --optimizer ada": "adamw",
    "distill train --method ka-l": "ka-lsr",
    "distill train --student digits-sm": "digits-small",
    "distill train --source tiny": "tiny-imagenet",
    "distill methods you": "you17",
    "precompute run --view imagenet-s": "imagenet-strong",
    "precompute run --teacher digits-sm": "digits-small",
    "precompute run --precision tf": "tf32",
    "distill eval fini": "finished",
    "distill train --store mlp-s": "mlp-store.zarr",
}
WITH_COLONS = {
    "precompute run --tap layer1:po": "layer1:pooled",
    "precompute run --teacher run:fini": "run:finished",
}
"""Lines whose last word bash splits."""
SECONDS = 120


class Terminal:
    """A shell on a terminal."""

    def __init__(self, shell, folder):
        main, side = pty.openpty()
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "$ "}
        self.process = subprocess.Popen(
            SHELLS[shell],
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(side)
        self.main, self.shown = main, ""

    def type(self, text):
        self.shown = ""
        os.write(self.main, text.encode())

    def wait_for(self, text):
        deadline = time.monotonic() + SECONDS
        while text not in self.shown:
            ready, _, _ = select.select([self.main], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown, but {self.shown!r}"
            self.shown += os.read(self.main, 4096).decode(errors="replace")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.main)


@pytest.mark.integration
@pytest.mark.parametrize("shell", SHELLS)
def test_values_are_completed(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "finished").mkdir()
    (tmp_path / "mlp-store.zarr").mkdir()
    terminal = Terminal(shell, tmp_path)
    try:
        terminal.type(f"{SETUP[shell]}{ADDED.format(shell=shell)}; echo rea''dy\n")
        terminal.wait_for("ready")
        for line, completed in (LINES | (WITH_COLONS if shell == "bash" else {})).items():
            terminal.type(f"{line}\t")
            terminal.wait_for(line.rpartition(" ")[0])
            terminal.wait_for(completed)
            terminal.type("\x15")  # clears the line
    finally:
        terminal.close()


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["--tap", "layer1", ":", "po"], ["plain,pooled"]),
        (["--tap", "layer1", ":"], [f"plain,{name}" for name in (*KNOWN_REDUCTIONS, SKETCH)]),
        (["--tap", "layer1:po"], ["plain,layer1:pooled"]),
        (["--tap", "layer1"], []),
        (["--tap", "layer1", ":", "map", "--tap", "layer2", ":", "gr"], ["plain,gram"]),
        (["--teacher", "run", ":", "teachers/c"], ["file,teachers/c"]),
        (["--teacher", "run", ":", "teachers/c", "--preci"], ["plain,--precision"]),
    ],
)
def test_words_that_bash_splits_at_colons(monkeypatch, words, completed):
    monkeypatch.setenv("COMP_WORDS", "\n".join(["precompute", "run", *words]))
    monkeypatch.setenv("COMP_CWORD", str(1 + len(words)))
    shown = Bash(precompute, {}, "precompute", "_PRECOMPUTE_COMPLETE").complete()
    assert shown.splitlines() == completed
