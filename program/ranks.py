"""The processes of a run: joining them, and exchanging numbers between them.

The same code runs in one process, on CPU (gloo) and on GPUs (NCCL).
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from program.errors import RunError, end, one_line


def start() -> tuple[int, int, torch.device]:
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


def leave() -> NoReturn:
    """Leave the process group, and end the process; see `end` in errors.py."""
    dist.destroy_process_group()
    end(0)


def die_with_parent() -> None:
    """Have Linux send SIGTERM when the parent, torchrun, dies; else this process would train on.

    Not SIGKILL: a batch system may send SIGUSR1 to every process of a run, and torchrun dies of it,
    while its workers are still to save.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def sum_over_ranks(values: list, device: torch.device | str) -> list[float]:
    """Sum a list of numbers over all ranks, in fp64; every rank gets the same list of floats."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def gather_lists(items: list) -> list:
    """The concatenation of every rank's list, on every rank."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def own_share(names: Iterable) -> list:
    """This rank's share of a list of files: every world-th name, in sorted order."""
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def raise_together(failure: BaseException | None, what: str) -> None:
    """Raise `RunError` on every rank if any rank has a failure (an exception, else None)."""
    failures = gather_lists([] if failure is None else [one_line(failure)])
    if failures:
        raise RunError(f"{what} ({failures[0]}); what was saved before is untouched")
