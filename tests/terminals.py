"""What a function writes to a terminal."""

import os
import pty
import sys
import threading

import click


def on_terminal(monkeypatch, columns, write, stream="stdout"):
    """What a function writes to a terminal on stdout or stderr."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    main, side = pty.openpty()
    shown = bytearray()

    def listen():
        try:
            while part := os.read(main, 1024):
                shown.extend(part)
        except OSError:  # how Linux says that the other side is closed
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, stream, terminal)
        write()
        monkeypatch.undo()
    listener.join(timeout=300)
    os.close(main)
    return click.unstyle(shown.decode()).replace("\r", "")
