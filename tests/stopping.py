"""Runs that are interrupted within their process, between two steps."""

import sys

import pytest
from builders import CPU

from coursepack.distill.runs.train import train

RUN, GROUP = (sys.modules[f"coursepack.distill.runs.{name}"] for name in ("student", "group"))


class Stopped(BaseException):
    """An interruption."""


def interrupted(monkeypatch, recipe, out, *, saves, **how):
    """Train until so many checkpoints are written, or one run is over."""
    left, save = [saves], RUN.save_checkpoint

    def counted(*arguments):
        save(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Stopped

    with monkeypatch.context() as patch:
        for module in (RUN, GROUP):
            patch.setattr(module, "save_checkpoint", counted)
        with pytest.raises(Stopped):
            train(recipe, out, device=CPU, resume=True, checkpoint_seconds=0, **how)
