"""Ctrl-C and SIGTERM: either ends a run after the current batch, and a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from coursepack.commands import INTERRUPTED
from coursepack.console import printable, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0
"""Time after the first signal in which another one is part of the same request: a terminal signals torchrun
and its ranks, and torchrun signals the ranks again."""
SHOW_CURSOR = "\x1b[?25h"
"""Terminal sequence that shows the cursor, which a progress bar hides."""


@contextmanager
def stoppable(stores: Sequence[str | Path], *, quiet: bool = False, step: str = "batch") -> Iterator[None]:
    """Stop in order on the first SIGINT or SIGTERM, and end the process on a second SIGINT.

    The first raises KeyboardInterrupt, whose handlers wait for the batch that the teacher is running. A
    second SIGINT may leave a partial file, as a killed process does; the next run removes it. Both exit with
    status 130. A second SIGTERM changes nothing: Slurm and torchrun may each send one, and follow it with
    SIGKILL. A signal that is ignored stays ignored.

    Args:
        stores: stores that are written, for the message.
        quiet: print nothing, as for all ranks but the first.
        step: what the first signal waits for, for the message.
    """
    names = ", ".join(repr(str(store)) for store in stores)
    advice = f"What is finished is kept; run the same command again to finish {names}."
    first: float | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if first is not None:
            if number == signal.SIGINT and time.monotonic() > first + SAME_SECONDS:
                _print_now("" if quiet else f"stopped at once. {advice}")
                os._exit(INTERRUPTED)
            return
        first = time.monotonic()
        _print_now("" if quiet else f"stopping after the current {step}; press Ctrl-C again to stop at once")
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        if not quiet:
            warn(f"stopped. {advice}")
        raise click.exceptions.Exit(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _print_now(text: str) -> None:
    """Print a line on stderr, past the buffers that the interrupted code may be writing to."""
    terminal = SHOW_CURSOR if sys.stderr.isatty() else ""
    if text or terminal:
        os.write(2, f"{terminal}{printable(text)}\n".encode())
