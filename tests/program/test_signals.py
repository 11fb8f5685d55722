"""signals.py: signals are noted, not obeyed, however many come; lost output stops nobody."""

import os
import signal
import sys

import pytest

from harm import FORKS
from program import signals
from program.signals import watch_signals

KINDS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def status(function, *args):
    """Run `function(*args)` in a process of its own; its exit status, 0 where it returns."""
    process = FORKS.Process(target=function, args=args)
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


def noted(numbers, window, expected):
    signals.ONE_WISH = window
    received = watch_signals()
    for number in numbers:
        os.kill(os.getpid(), number)
    assert received == expected, received


@pytest.mark.parametrize("number", KINDS)
def test_many_signals_of_one_kind_are_one(number):
    """As when a launcher passes on what its workers got, too: noted once, and nobody dies."""
    assert status(noted, [number] * 5, signals.ONE_WISH, [number]) == 0


def test_kinds_are_noted_in_their_order():
    """The first one gives the exit status."""
    numbers = [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM]
    expected = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
    assert status(noted, numbers, signals.ONE_WISH, expected) == 0


@pytest.mark.parametrize("number", KINDS)
def test_a_later_second_signal_kills_only_where_it_is_a_sigint(number):
    """A person's second Ctrl-C; batch systems repeat the others while a run is still saving."""
    survives = number != signal.SIGINT
    assert status(noted, [number] * 3, -1, [number]) == (0 if survives else -number)


def under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    noted([signal.SIGHUP, signal.SIGTERM], signals.ONE_WISH, [signal.SIGTERM])


def test_an_ignored_sighup_stays_ignored():
    """`nohup python sft.py` goes on when its terminal is closed."""
    assert status(under_nohup) == 0


def without_a_reader():
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    os.close(reader)
    watch_signals()
    watch_signals()  # as two runs in one process do
    for _ in range(1000):
        print("a line that nobody reads", flush=True)
        print("nor this one", file=sys.stderr)
    assert sys.stdout.fileno() == 1


def test_output_that_nobody_reads_stops_nobody():
    """Ctrl-C ends the `tee` behind a run, too, and a closed terminal takes no text."""
    assert status(without_a_reader) == 0
