"""How a model is spread over ranks: FSDP2, with recomputation and compilation of each block.

Each rank holds a slice of every weight, gradient and optimizer state (ZeRO-3; Rajbhandari et al.
2020, arXiv 1910.02054), or of its replica's. FSDP2 gathers a block's weights just before the block
runs and frees them after it. The process group itself is program/ranks.py's.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from model import Llama
from training.flags import RunFlags


def shard(model: Llama, config: RunFlags, device: torch.device,
          reshard: bool | None = None) -> None:  # fmt: skip
    """Make a model that was built on the meta device ready to train, in place.

    The last `recompute` blocks compute their activations again in backward. compile: torch.compile
    for each block. Then FSDP2 shards the weights over each replica's ranks, and each rank gets
    memory, not filled yet, for its own slices alone. Master weights, gradients and their reduction
    are fp32; the blocks compute in `config.dtype`. reshard: whether a block's gathered weights are
    freed between forward and backward (default: where some of them are other ranks').
    """
    world, dtype = dist.get_world_size(), getattr(torch, config.dtype)
    layers = model.model.layers
    for block in layers[len(layers) - (config.recompute or 0) :]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile:
        for block in layers:
            block.forward = torch.compile(block.forward, dynamic=True)
    # A single rank in fp32 has nothing to gather and nothing to cast: FSDP would only copy every
    # gradient, twice in each backward pass.
    if world > 1 or dtype != torch.float32:
        if reshard is None:
            # A rank that holds all weights keeps its 16-bit copy, instead of casting it twice.
            reshard = world > config.replicas
        # Weights that are not trained (adapters/) are in `dtype` already: where a rank holds all of
        # them, FSDP would keep a second copy.
        whole = world == config.replicas
        fsdp = {
            "mesh": mesh_of_ranks(device, world, config.replicas),
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            "ignored_params": {p for p in model.parameters() if whole and not p.requires_grad},
        }
        for block in layers:
            fully_shard(block, reshard_after_forward=reshard, **fsdp)
        # The rest (embedding, last norm, head) is one group. It stays gathered after the forward
        # pass, because the backward pass begins with the head.
        fully_shard(model, reshard_after_forward=False, **fsdp)
    model.to_empty(device=device)


def mesh_of_ranks(device: torch.device, world: int, replicas: int) -> DeviceMesh:
    """One row of all ranks or, with several replicas, a row for each (hybrid sharding, HSDP).

    Weights are sharded along a row. Gradients are summed along it, too, and then over the rows.
    """
    if replicas == 1:
        return init_device_mesh(device.type, (world,))
    shape, names = (replicas, world // replicas), ("replicate", "shard")
    return init_device_mesh(device.type, shape, mesh_dim_names=names)
