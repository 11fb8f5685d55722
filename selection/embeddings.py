"""What one forward pass over a packed row says of its conversations: RDS+, perplexity, IFD.

RDS+ (Ivison et al. 2025, arXiv 2503.01807, section 3): a conversation's embedding is the weighted
mean of its tokens' hidden states after the last norm,

    e = Σ_i w_i h_i,   w_i = (i + 1) / Σ_j (j + 1),   i = 0, 1, … in the conversation            (1)

prompt and answer alike, so that tokens that have seen more count more. A score is the cosine of two
embeddings. The weights and the sum are fp32: positions in bf16 are exact only up to 256.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from data import pack_row
from kernels.attention import attention
from model import Llama


def row_tensors(sequences: list[tuple], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays of a packed row of `sequences`, on `device`."""
    return {name: torch.from_numpy(a).to(device) for name, a in pack_row(sequences).items()}


@torch.no_grad()
def embeddings(model: Llama, sequences: list[tuple], device: torch.device) -> torch.Tensor:
    """(1) of each sequence of a row, scaled to length 1: (n, E) fp32 on `device`."""
    row = row_tensors(sequences, device)
    seen = {name: row[name] for name in ("doc_start", "doc_end", "tiles")}
    attends = [functools.partial(attention, **seen)] * len(model.model.layers)
    hidden = model.model(row["input_ids"], row["positions"], attends)  # (T, E)
    weighted = hidden.float() * (row["positions"] + 1).float()[:, None]
    # Scaling to length 1 divides by Σ_j (j + 1), too. `split`, and no index_add: on a GPU that
    # would add in another order each time.
    parts = weighted.split([len(ids) for ids, _ in sequences])
    return F.normalize(torch.stack([part.sum(0) for part in parts]), dim=-1)


@torch.no_grad()
def answer_losses(model: Llama, sequences: list[tuple], device: torch.device) -> torch.Tensor:
    """Mean negative log-likelihood of each sequence's trained tokens: (n,) fp32, nats."""
    nll = model(**row_tensors(sequences, device))  # (N,)
    parts = nll.split([int(np.count_nonzero(trained)) for _, trained in sequences])
    return torch.stack([part.mean() for part in parts])


def perplexity(model: Llama, sequences: list[tuple], device: torch.device) -> torch.Tensor:
    """exp of the answer's mean loss after its prompt: (n,)."""
    return answer_losses(model, sequences, device).exp()


def ifd(model: Llama, sequences: list[tuple], device: torch.device) -> torch.Tensor:
    """How little the prompt helps: the answer's perplexity after it, over that of the answer alone.

    Li et al. 2023 (arXiv 2308.12032), equation 3. Alone: BOS and all trained tokens after it.
    """
    alone = [without_prompt(*sequence) for sequence in sequences]
    losses = answer_losses(model, sequences, device)
    return (losses - answer_losses(model, alone, device)).exp()


def without_prompt(ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """BOS and the trained tokens of a sequence, as a sequence."""
    answer = np.concatenate([ids[:1], ids[trained]])
    return answer, np.arange(len(answer)) > 0
