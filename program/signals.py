"""The signals that ask a run to stop: it finishes the update, saves, and exits."""

import contextlib
import os
import signal
import sys
import time
from typing import TextIO

ONE_WISH = 5  # seconds in which signals of one kind are one wish to stop


def watch_signals() -> list[int]:
    """A list to which SIGTERM, SIGINT, SIGHUP and SIGUSR1 are added, each kind once.

    The loops look at the list once an update: they save and stop where it is not empty. A batch
    system signals every process of a run, and torchrun passes on what it gets: so more signals of
    one kind are the same wish. Only a SIGINT more than `ONE_WISH` seconds after the first kills at
    once: a person's second Ctrl-C. SIGHUP stays ignored where the parent ignores it (nohup).
    """
    received, first = [], {}

    def note(number, frame):
        now = time.monotonic()
        if number == signal.SIGINT and now - first.get(number, now) > ONE_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number not in first:
            first[number] = now
            received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    # The signal that says a terminal is closed, or a Ctrl-C that ends `| tee log`, too, takes our
    # output along: what cannot be printed must not end the run before it has saved.
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, LastingOutput(stream))
    return received


class LastingOutput:
    """A text stream that drops what cannot be written: its terminal or its reader is gone."""

    def __init__(self, stream: "TextIO | LastingOutput") -> None:
        self.stream = getattr(stream, "lasting", stream)
        self.lasting = self.stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()
