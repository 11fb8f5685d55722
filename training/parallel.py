"""How a model is spread over ranks: FSDP2, with recomputation and compilation of each block.

Each rank holds a slice of every weight, gradient and optimizer state (ZeRO-3; Rajbhandari et al.
2020, arXiv 1910.02054). FSDP2 gathers a block's weights just before the block runs and frees them
after it. The process group itself is program/ranks.py's.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint


def shard(model, config, device):
    """Make a model that was built on the meta device ready to train, in place.

    config: `RunFlags`. recompute: each block computes its activations again in backward. compile:
    torch.compile for each block. Then FSDP2 shards the weights, and each rank gets memory, not
    filled yet, for its own slices alone. Master weights, gradients and their reduction are fp32;
    the blocks compute in `config.dtype`.
    """
    world, dtype = dist.get_world_size(), getattr(torch, config.dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        if config.recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if config.compile:
            block.forward = torch.compile(block.forward, dynamic=True)
    # A single rank in fp32 has nothing to gather and nothing to cast: FSDP would only copy every
    # gradient, twice in each backward pass.
    if world > 1 or dtype != torch.float32:
        # Weights that are not trained (adapters/) are in `dtype` already: on a single rank FSDP
        # would keep a second copy of them.
        frozen = {p for p in model.parameters() if not p.requires_grad and world == 1}
        for block in model.model.layers:
            # A single rank keeps its 16-bit copy for backward, instead of casting a second time.
            fully_shard(
                block, mp_policy=policy, reshard_after_forward=world > 1, ignored_params=frozen
            )
        # The rest (embedding, last norm, head) is one group. It stays gathered after the forward
        # pass, because the backward pass begins with the head.
        fully_shard(model, mp_policy=policy, reshard_after_forward=False, ignored_params=frozen)
    model.to_empty(device=device)
