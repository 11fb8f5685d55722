"""The processes of a run: joining them, exchanging numbers between them, signals that stop them.

The same code runs in one process, on CPU (gloo) and on GPUs (NCCL).
"""

import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from program.errors import RunError, one_line


def start():
    """Join torchrun's process group, or make one of this process alone: `(rank, world, device)`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by a caller that runs more than one thing in a process
        return rank, world, device
    launched = "RANK" in os.environ
    if launched:
        die_with_parent()
    # Half an hour: the longest wait is for rank 0 while it writes a tensor to a slow disk.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=None if launched else dist.HashStore(),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=30),
    )
    return rank, world, device


def die_with_parent():
    """Have Linux kill this process when torchrun dies: it would train on into the same folder."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def sum_over_ranks(values, device):
    """The sums over all ranks of a list of numbers, in fp64; every rank gets the same."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def gather_lists(items):
    """The concatenation of every rank's list, on every rank."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for own in lists for item in own]


def watch_signals():
    """A list to which the first SIGTERM or SIGINT is added; the second one kills, as usual."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return received


def own_share(names):
    """Every world-th of the names: this rank's part of a work on files."""
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def raise_together(failure, what):
    """Raise `RunError` on every rank where one has a failure."""
    failures = gather_lists([] if failure is None else [one_line(failure)])
    if failures:
        raise RunError(f"{what} ({failures[0]}); what was saved before is untouched")
