"""LESS: how much a step of Adam on a candidate would lower the loss of a query.

Xia et al. 2024 (arXiv 2402.04333). Let a run of Adam stand at θ with its moments m and v. A step of
rate η on candidate z alone moves θ by -η Γ_z, and to first order the loss of a query q falls by

    η ⟨g_q, Γ_z⟩,   Γ_z = (β₁ m + (1 - β₁) g_z) / √(β₂ v + (1 - β₂) g_z² + eps)                (1)

with g the gradient of the mean loss of one conversation's trained tokens (LESS's code: eps inside
the root, no correction of the moments' bias). A short answer has a large gradient, so the score
takes the cosine instead of the inner product, and sums over the run's checkpoints c, by their share
of the rates:

    score(z, q) = Σ_c η_c / Σ η · cos(P Γ_z, P g_q)                                            (2)

- The gradients are those of a low-rank probe (probe.py), which a short run trains first, the
  warm-up: it gives the moments, and checkpoints at which the data are no longer strange to it.
- P is a random ±1 matrix (Johnson and Lindenstrauss): with d rows, an inner product of unit vectors
  is off by about 1/√d. It is made again, block by block, for each batch of gradients: at 7B a probe
  of rank 16 has 22 M numbers, and P of 8,192 rows would have 174 G.

Cost: a forward and a backward pass over every candidate at each checkpoint (4), some three times
what training on them would take, and a product with P. RDS+ needs one forward pass, and does better
in Ivison et al. 2025 (46.4 against 44.2): LESS is here to be compared.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data import epoch_order, plan_rows, update_count
from model import Llama
from program.files import written_aside
from selection.embeddings import row_tensors
from tokens.documents import Documents
from training.update import learning_rate

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
BATCH, WARMUP_RATIO = 32, 0.03  # LESS's
BLOCK = 4096  # coordinates of the gradient that are projected at a time
GRADIENT_BYTES = 2 << 30  # of the gradients that are projected together


# ---- The warm-up


def warm_up(
    model: Llama, parameters: list[Tensor], documents: Documents, config, folder: Path,
    device: torch.device,
) -> None:  # fmt: skip
    """Train the probe for `config.warmup_epochs` epochs on `config.warmup_share` of the data.

    Leaves `folder/checkpoint-<epoch>.pt` after each: probe, optimizer, mean rate of the epoch.
    Those that are there are not made again. Every rank calls it, and computes its rows.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    share = max(1, round(config.warmup_share * len(documents)))
    members = np.random.default_rng([config.seed, 1]).permutation(len(documents))[:share]
    per_epoch, total = update_count(share, BATCH, config.warmup_epochs)
    optimizer = torch.optim.Adam(parameters, betas=(BETA1, BETA2), eps=EPS)
    for epoch in range(config.warmup_epochs):
        path = folder / f"checkpoint-{epoch + 1}.pt"
        if path.exists():
            optimizer.load_state_dict(load_checkpoint(path, parameters)["optimizer"])
            continue
        order, rates = members[epoch_order(share, config.seed, epoch)], []
        for k in range(per_epoch):
            batch = order[k * BATCH : (k + 1) * BATCH]
            trained = documents.trained_counts[batch].sum()
            rows = plan_rows(
                documents.tokens[batch], world, config.micro_tokens, model.config.hidden_size
            )[rank]
            optimizer.zero_grad()
            for row in filter(None, rows):
                tensors = row_tensors(documents.sequences(batch[row]), device)
                (model(**tensors, uniform_gradient=True).sum() / trained).backward()
            for parameter in parameters:
                if parameter.grad is None:  # this rank had nothing to do
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
            rates.append(
                learning_rate(epoch * per_epoch + k, total, config.warmup_lr, WARMUP_RATIO)
            )
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            optimizer.step()
        if rank == 0:
            with written_aside(path, "wb") as file:
                state = {"probe": [p.detach() for p in parameters], "rate": float(np.mean(rates))}
                torch.save(state | {"optimizer": optimizer.state_dict()}, file)
        dist.barrier()


def load_checkpoint(path: Path, parameters: list[Tensor]) -> dict:
    """Put a checkpoint's probe into `parameters`; its other parts, with `m` and `v` as vectors."""
    state = torch.load(path, map_location=parameters[0].device, weights_only=True)
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["probe"], strict=True):
            parameter.copy_(saved)
    moments = [state["optimizer"]["state"][k] for k in range(len(parameters))]
    state["m"] = flat([moment["exp_avg"] for moment in moments])
    state["v"] = flat([moment["exp_avg_sq"] for moment in moments])
    return state


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


def project(vectors: Tensor, dimensions: int, seed: int) -> Tensor:
    """P of (2) times each of vectors (n, D), over √dimensions: (n, dimensions) fp32.

    Row by row of Pᵀ in blocks, each of which is a function of (seed, its number).
    """
    out = torch.zeros(len(vectors), dimensions, device=vectors.device)
    generator = torch.Generator(vectors.device)
    for number, block in enumerate(vectors.split(BLOCK, dim=1)):
        generator.manual_seed((seed << 24) + number)
        shape, kind = (block.shape[1], dimensions), {"dtype": torch.int8, "device": out.device}
        bits = torch.randint(0, 2, shape, generator=generator, **kind)
        out += block @ (2 * bits - 1).to(block.dtype)
    return out / dimensions**0.5


def directions(
    model: Llama, parameters: list[Tensor], sequences: list[tuple], config, device: torch.device,
    state: dict | None = None,
) -> Tensor:  # fmt: skip
    """P g, or with a checkpoint's state P Γ, of each sequence, scaled to length 1: (n, d).

    The gradients of as many as GRADIENT_BYTES hold are projected together.
    """
    size = sum(parameter.numel() for parameter in parameters)
    at_once, projected = max(1, GRADIENT_BYTES // (4 * size)), []
    for start in range(0, len(sequences), at_once):
        vectors = []
        for sequence in sequences[start : start + at_once]:
            g = gradient(model, parameters, sequence, device)
            vectors.append(g if state is None else adam_step(g, state["m"], state["v"]))
        projected.append(project(torch.stack(vectors), config.projection, config.seed))
    return F.normalize(torch.cat(projected), dim=-1)


def scorer(
    model: Llama, parameters: list[Tensor], queries: Documents, config, path: Path,
    device: torch.device,
) -> tuple[float, Callable]:  # fmt: skip
    """(rate, score) of a checkpoint: score(sequences) gives cosines (queries, n) as in (2)."""
    state = load_checkpoint(path, parameters)
    wanted = queries.sequences(range(len(queries)))
    asked = directions(model, parameters, wanted, config, device)

    def score(sequences):
        own = directions(model, parameters, sequences, config, device, state)
        return (asked @ own.T).cpu().numpy()

    return state["rate"], score


def tidy(folder: Path) -> None:
    """Delete the checkpoints and what they scored: nothing needs them once (2) is complete."""
    for path in [*folder.glob("checkpoint-*.pt"), *folder.glob("scores-*")]:
        os.unlink(path)
