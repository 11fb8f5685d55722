"""How far a long piece of work has come: a bar on a terminal, a line now and then in a log file."""

import os
import sys
import time

from tqdm import tqdm

SECONDS, SHARE = 30, 0.05  # a log gets a line after so long, or so much of the work


def progress_bar(**options) -> "tqdm | LogLines":
    """tqdm's bar, or `LogLines` where standard error is no terminal; `options` are tqdm's."""
    if options.get("disable") or (sys.stderr is not None and sys.stderr.isatty()):
        return tqdm(**options, dynamic_ncols=True)
    return LogLines(options)


class LogLines:
    """What tqdm's bar would show, as whole lines. In a file its `\\r` would make one long line."""

    def __init__(self, options: dict) -> None:
        self.bar = tqdm(**options, file=open(os.devnull, "w"))
        self.shown, self.when = self.bar.n, time.monotonic()

    def __getattr__(self, name):
        return getattr(self.bar, name)

    def update(self, n: float = 1) -> None:
        self.bar.update(n)
        waited, done = time.monotonic() - self.when, self.bar.n - self.shown
        if waited >= SECONDS or done >= SHARE * self.bar.total:
            self.show()

    def show(self) -> None:
        print(self.bar, file=sys.stderr, flush=True)
        self.shown, self.when = self.bar.n, time.monotonic()

    def close(self) -> None:
        if self.bar.leave and self.bar.n > self.shown:
            self.show()
        self.bar.close()
        self.bar.fp.close()
