"""How a run is spread over processes: process group, FSDP2, recomputation, sums over ranks.

Each rank holds a slice of every weight, gradient and optimizer state (ZeRO-3; Rajbhandari et al.
2020). FSDP2 gathers a block's weights just before the block runs and drops them after it. The same
code runs in one process, on CPU (gloo) and on GPUs (NCCL).
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint


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


