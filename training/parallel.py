"""How a run is spread over processes: process group, FSDP2, recomputation, sums over ranks.

Each rank holds a slice of every weight, gradient and optimizer state (ZeRO-3; Rajbhandari et al.
2020). FSDP2 gathers a block's weights just before the block runs and drops them after it. The same
code runs in one process, on CPU (gloo) and on GPUs (NCCL).
"""

import ctypes
import functools
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint


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


def shard(model, device, dtype, recompute=False, compile=False):
    """Wrap a model built on the meta device in FSDP2, in place; one fp32 rank needs none.

    Each rank then has memory, not filled yet, for its own slices alone. Master weights, gradients
    and their reduction are fp32; `dtype` is what the blocks compute in.
    """
    world = dist.get_world_size()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compile:
            block.forward = torch.compile(block.forward, dynamic=True)
    # One rank that computes in fp32 has nothing to gather and nothing to cast: FSDP would only copy
    # every gradient, twice in each backward pass.
    if world > 1 or dtype != torch.float32:
        for block in model.model.layers:
            # One rank has nothing to gather a second time for backward.
            fully_shard(block, mp_policy=policy, reshard_after_forward=world > 1)
        # The rest (embedding, last norm, head) is one group. It stays gathered from the forward
        # pass to the backward pass, which begins with the head.
        fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)


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
