"""A low-rank probe beside each of the seven projections of a block: where LESS takes gradients.

For a frozen weight W (N, K), a fixed random A (R, K) and a trained B (N, R) that starts at zero:

    y = W x + B A x                                                                             (1)

That is LoRA (Hu et al. 2021, arXiv 2106.09685) with its A frozen. The gradient of B is the full
weight's gradient times Aᵀ, a random sketch of it, which has the same sense wherever B stands. A has
the size of LESS's adapters: uniform in ±1/√K, times their alpha / rank, 512 / 128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Llama

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALE = 4.0  # LESS: alpha 512, rank 128


class Probe(nn.Module):
    """(1), in place of an `nn.Linear`; B is fp32, all else in the linear's type."""

    def __init__(self, linear: nn.Linear, rank: int, seed: int) -> None:
        super().__init__()
        self.linear = linear
        N, K = linear.weight.shape
        generator = torch.Generator().manual_seed(seed)  # on CPU: the same on any device
        A = (torch.rand(min(rank, N, K), K, generator=generator) * 2 - 1) * (SCALE / K**0.5)
        self.register_buffer("A", A.to(linear.weight))
        self.B = nn.Parameter(torch.zeros(N, len(A), device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B.to(x.dtype))


def put_probes(model: Llama, rank: int, seed: int) -> list[nn.Parameter]:
    """Freeze a loaded model and put probes into it; their parameters B, in the model's order."""
    model.requires_grad_(False)
    probes = []
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name in (name for name in PROJECTIONS if hasattr(parent, name)):
                probe = Probe(getattr(parent, name), rank, seed + 1_000_003 * len(probes))
                setattr(parent, name, probe)
                probes.append(probe)
    return [probe.B for probe in probes]
