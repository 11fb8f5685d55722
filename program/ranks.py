"""The processes of a run: joining them, exchanging numbers between them, signals that stop them.

The same code runs in one process, on CPU (gloo) and on GPUs (NCCL).
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from program.errors import RunError, one_line

ONE_WISH = 5  # seconds in which signals of one kind are one wish to stop


def start():
    """Join torchrun's process group, or form one of a single process; `(rank, world, device)`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_initialized():  # a second call in the same process changes nothing
        return rank, world, device
    launched = "RANK" in os.environ
    if launched:
        die_with_parent()
    # Half an hour, since the other ranks wait while rank 0 writes a tensor to a slow disk.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=None if launched else dist.HashStore(),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=30),
    )
    return rank, world, device


def die_with_parent():
    """Have Linux send SIGTERM when the parent, torchrun, dies; else this process would train on.

    Not SIGKILL: a batch system may send SIGUSR1 to every process of a run, and torchrun dies of it,
    while its workers are still to save.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def sum_over_ranks(values, device):
    """Sum a list of numbers over all ranks, in fp64; every rank gets the same list of floats."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def gather_lists(items):
    """The concatenation of every rank's list, on every rank."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def watch_signals():
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

    def __init__(self, stream):
        self.stream = getattr(stream, "lasting", stream)
        self.lasting = self.stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def own_share(names):
    """This rank's share of a list of files: every world-th name, in sorted order."""
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def raise_together(failure, what):
    """Raise `RunError` on every rank if any rank has a failure (an exception, else None)."""
    failures = gather_lists([] if failure is None else [one_line(failure)])
    if failures:
        raise RunError(f"{what} ({failures[0]}); what was saved before is untouched")
