"""LESS: how much a step of Adam on a candidate would lower the loss of a query.

Xia et al. 2024 (arXiv 2402.04333). Let a run of Adam stand at θ with its moments m and v. A step of
rate η on candidate z alone moves θ by -η Γ_z, and to first order the loss of a query q falls by

    η ⟨g_q, Γ_z⟩,   Γ_z = (β₁ m + (1 - β₁) g_z) / √(β₂ v + (1 - β₂) g_z² + eps)                (1)

with g the gradient of the mean loss of one conversation's trained tokens (LESS's code: eps inside
the root, no correction of the moments' bias). A short answer has a large gradient, so the score
takes the cosine instead of the inner product, and sums over the run's checkpoints c, by their share
of the rates:

    score(z, q) = Σ_c η_c / Σ η · cos(P Γ_z, P g_q)                                            (2)

- θ are LoRA adapters (adapters/lora.py), A and B, beside the four projections of attention: 134 M
  numbers at 7B and LESS's rank of 128, in place of 6.7 G.
- A short run trains them first, the warm-up. It gives the moments, and checkpoints at which the
  data are no longer strange to the model. And it moves B away from zero: there A's gradient, Bᵀ
  times that of the product, is zero, and half of g would say nothing. Its dropout is for training
  alone: a gradient that is compared has none.
- P is a random ±1 matrix (Johnson and Lindenstrauss): with d rows, an inner product of unit vectors
  is off by about 1/√d. It is made again, block by block, for each batch of gradients: P of 8,192
  rows for 134 M numbers would have 1.1 T.

Cost: at each checkpoint (4) a forward pass over every candidate, a backward pass, which through
frozen weights costs the same, and a product with P: some three times what a pass of training on
them takes, counted in selection/cost.py. RDS+ needs one forward pass, and does better in Ivison et
al. 2025 (46.4 against 44.2): LESS is here to be compared.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from adapters.dropout import Dropout
from adapters.lora import check_lora, narrowest, put_in
from data import epoch_order, plan_rows, update_count
from decoding.room import gpu_of
from model import Llama, LlamaConfig
from program.errors import InputError, RunError
from program.files import written_aside
from selection.embeddings import row_tensors
from tokens.documents import Documents
from training.update import learning_rate

# LESS's, as are the defaults of the flags.
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
BATCH, WARMUP_RATIO = 32, 0.03
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, SCALE, DROPOUT = 128, 4.0, 0.1  # of the adapters; alpha is 512, SCALE times the rank

BLOCK = 4096  # coordinates of the gradient that are projected at a time
GRADIENT_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}  # at most; see gradient_bytes


@dataclass(frozen=True)
class LessFlags:
    """--method less. The defaults are LESS's."""

    projection: int = 8192  # numbers that a gradient is projected to
    lora_rank: int | None = None  # of the adapters (default: 128, or the narrowest projection's)
    warmup_share: float = 0.05  # share of the data that the adapters are trained on first
    warmup_epochs: int = 4  # passes over that share; after each, all data are scored
    warmup_lr: float = 2e-5  # peak learning rate of those passes


# ---- The adapters


def with_rank(config, model_config: LlamaConfig) -> Any:
    """The flags with their rank filled in. Raises `InputError` where it does not fit the model."""
    if config.lora_rank == 0:
        raise InputError("--lora-rank is 0, expected an integer from 1 up")
    config = replace(config, lora_rank=config.lora_rank or min(RANK, narrowest(model_config)))
    check_lora(model_config, SimpleNamespace(lora_rank=config.lora_rank, quantize=None))
    return config


def put_adapters(model: Llama, config) -> Dropout:
    """Put LESS's adapters into a model on the meta device; returns their `Dropout`."""
    flags = SimpleNamespace(
        lora_rank=config.lora_rank, lora_alpha=SCALE * config.lora_rank, lora_dropout=DROPOUT,
        quantize=None, seed=config.seed, dtype=config.dtype,
    )  # fmt: skip
    return put_in(model, flags, ADAPTED)


def trained_parameters(model: Llama) -> list[Tensor]:
    """A and B of every adapter, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---- The warm-up


def warm_up(
    model: Llama, dropout: Dropout, documents: Documents, config, folder: Path, device: torch.device
) -> None:
    """Train the adapters for `config.warmup_epochs` epochs on `config.warmup_share` of the data.

    Leaves `folder/checkpoint-<epoch>.pt` after each: adapters, optimizer, mean rate of the epoch.
    Those that are there are not made again. Every rank calls it, and computes its rows. Afterwards
    nothing is dropped any more.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    share = max(1, round(config.warmup_share * len(documents)))
    members = np.random.default_rng([config.seed, 1]).permutation(len(documents))[:share]
    per_epoch, total = update_count(share, BATCH, config.warmup_epochs)
    longest = int(documents.tokens.max())  # so a row keeps no more activations than scoring does
    parameters = trained_parameters(model)
    optimizer = torch.optim.Adam(parameters, betas=(BETA1, BETA2), eps=EPS)
    for epoch in range(config.warmup_epochs):
        path = folder / f"checkpoint-{epoch + 1}.pt"
        if path.exists():
            load_checkpoint(path, parameters, optimizer)
            continue
        order, rates = members[epoch_order(share, config.seed, epoch)], []
        for k in range(per_epoch):
            batch = order[k * BATCH : (k + 1) * BATCH]
            trained = documents.trained_counts[batch].sum()
            rows = plan_rows(documents.tokens[batch], world, longest, model.config.hidden_size)
            dropout.update = epoch * per_epoch + k
            optimizer.zero_grad()
            for row in filter(None, rows[rank]):
                tensors = row_tensors(documents.sequences(batch[row]), device)
                (model(**tensors, uniform_gradient=True).sum() / trained).backward()
            for parameter in parameters:
                if parameter.grad is None:  # this rank had nothing to do
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
            rates.append(learning_rate(dropout.update, total, config.warmup_lr, WARMUP_RATIO))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            optimizer.step()
        if not torch.stack([parameter.isfinite().all() for parameter in parameters]).all():
            rate = config.warmup_lr
            raise RunError(f"less, warm-up: adapters are not finite, at --warmup-lr {rate}")
        if rank == 0:
            with written_aside(path, "wb") as file:
                state = {"adapters": [parameter.detach() for parameter in parameters]}
                state |= {"optimizer": optimizer.state_dict(), "rate": np.mean(rates).item()}
                torch.save(state, file)
        dist.barrier()
    dropout.share = 0.0


def load_checkpoint(
    path: Path, parameters: list[Tensor], optimizer: torch.optim.Optimizer | None = None
) -> dict:
    """Put a checkpoint's adapters into `parameters`, and its state into `optimizer`, if given.

    Returns the epoch's `rate`, and the moments `m` and `v` as vectors, fp32.
    """
    state = torch.load(path, map_location=parameters[0].device, weights_only=True)
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["adapters"], strict=True):
            parameter.copy_(saved)
    moments = [state["optimizer"]["state"][k] for k in range(len(parameters))]
    if optimizer:
        optimizer.load_state_dict(state["optimizer"])
    m, v = (flat([moment[name] for moment in moments]) for name in ("exp_avg", "exp_avg_sq"))
    return {"rate": state["rate"], "m": m, "v": v}  # the rest is not kept: memory is dear


def checkpoints(folder: Path, config) -> list[Path]:
    """Paths of the warm-up's checkpoints."""
    return [folder / f"checkpoint-{epoch + 1}.pt" for epoch in range(config.warmup_epochs)]


# ---- Gradients and their projection


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(
    model: Llama, parameters: list[Tensor], sequence: tuple, device: torch.device
) -> Tensor:
    """g of the mean loss of one conversation's trained tokens: a vector, fp32."""
    loss = model(**row_tensors([sequence], device), uniform_gradient=True).mean()
    return flat(torch.autograd.grad(loss, parameters))


def adam_step(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """Γ of (1): the step of Adam with moments m and v on the gradient g, over its rate."""
    return (BETA1 * m + (1 - BETA1) * g) / (BETA2 * v + (1 - BETA2) * g * g + EPS).sqrt()


def gradient_bytes(device: torch.device) -> int:
    """The most that the gradients which are projected together take: on a GPU half its room."""
    if device.type == "cpu":
        return GRADIENT_BYTES["cpu"]
    return min(GRADIENT_BYTES["cuda"], gpu_of(device).free // 2)


def project(vectors: Tensor, dimensions: int, seed: int) -> Tensor:
    """P of (2) times each of vectors (n, D), over √dimensions: (n, dimensions) fp32.

    Row by row of Pᵀ in blocks, each of which is a function of (seed, its number).
    """
    out = torch.zeros(len(vectors), dimensions, device=vectors.device)
    generator = torch.Generator(vectors.device)
    eight = torch.arange(8, dtype=torch.uint8, device=vectors.device)
    for number, block in enumerate(vectors.split(BLOCK, dim=1)):
        generator.manual_seed(((seed << 24) + number) % 2**63)
        drawn = torch.empty(block.shape[1], -(-dimensions // 8), 1, dtype=torch.uint8,
                            device=vectors.device).random_(generator=generator)  # fmt: skip
        bits = (drawn >> eight & 1).flatten(1)[:, :dimensions]  # (BLOCK, dimensions)
        out += block @ (2 * bits.to(block.dtype) - 1)
    return out / dimensions**0.5


def directions(
    model: Llama, sequences: list[tuple], config, device: torch.device, state: dict | None = None
) -> Tensor:
    """P g, or with a checkpoint's state P Γ, of each sequence, scaled to length 1: (n, d).

    The gradients of as many as `gradient_bytes` hold are projected together, in the model's type.
    """
    parameters = trained_parameters(model)
    size, dtype = sum(p.numel() for p in parameters), getattr(torch, config.dtype)
    at_once = max(1, gradient_bytes(device) // (dtype.itemsize * size))
    vectors = torch.empty(min(at_once, len(sequences)), size, dtype=dtype, device=device)
    projected = []
    for start in range(0, len(sequences), at_once):
        some = sequences[start : start + at_once]
        for vector, sequence in zip(vectors, some, strict=False):
            g = gradient(model, parameters, sequence, device)
            vector.copy_(g if state is None else adam_step(g, state["m"], state["v"]))
        projected.append(project(vectors[: len(some)], config.projection, config.seed))
    return F.normalize(torch.cat(projected), dim=-1)


def scorer(
    model: Llama, queries: Documents, config, path: Path, device: torch.device
) -> tuple[float, Callable]:
    """(rate, score) of a checkpoint: score(sequences) gives cosines (queries, n) as in (2)."""
    state = load_checkpoint(path, trained_parameters(model))
    wanted = queries.sequences(range(len(queries)))
    asked = directions(model, wanted, config, device)

    def score(sequences):
        own = directions(model, sequences, config, device, state)
        return (asked @ own.T).cpu().numpy()

    return state["rate"], score


def tidy(folder: Path) -> None:
    """Delete the checkpoints and what they scored: nothing needs them once (2) is complete."""
    for path in [*folder.glob("checkpoint-*.pt"), *folder.glob("scores-*")]:
        os.unlink(path)
