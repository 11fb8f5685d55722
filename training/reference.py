"""Log-probabilities of answers: the policy's, with gradients, the reference's, and held-out data's.

All come from `answer_logps`, so that before the first update they are equal but for rounding.
Called by dpo.py and held_out.py.
"""

import math

import numpy as np
import torch
import torch.distributed as dist

from checkpoint.reference_file import read_reference, reference_files, write_reference
from data import pack_row, plan_rows
from model import Llama
from program.errors import RunError, amount
from program.progress import progress_bar
from tokens.documents import Documents


def answer_logps(model: Llama, documents: Documents, pairs: np.ndarray,
                 device: torch.device) -> torch.Tensor:  # fmt: skip
    """Summed log-probability (n, 2) of the chosen and the rejected answer of each of n pairs.

    The pairs are one packed row, in which a prompt stands once. For conversations (n, 1): the sum
    over all answers of each. Differentiable; the reference is computed by this, too.
    """
    arrays = pack_row(documents.sequences(pairs), documents.shared[pairs].ravel())
    nll = model(**{name: torch.from_numpy(a).to(device) for name, a in arrays.items()})  # (N,)
    answers = nll.split(documents.trained_counts[pairs].ravel().tolist())
    per_record = documents.trained_counts.shape[1]
    if not answers:  # an empty row: its (empty) nll must reach backward on this rank, too
        return nll.new_zeros(0, per_record) + nll.sum()
    return torch.stack([-answer.sum() for answer in answers]).view(-1, per_record)


def summed_logps(model: Llama, documents: Documents, records: np.ndarray, config,
                 device: torch.device) -> torch.Tensor:  # fmt: skip
    """`answer_logps` of any number of records, in fp64, on every rank: each computes a share."""
    tokens, squares = documents.tokens[records], documents.squares[records]
    part = torch.zeros(documents.trained_counts[records].shape, dtype=torch.float64)
    rank, world, hidden_size = dist.get_rank(), dist.get_world_size(), model.config.hidden_size
    for row in plan_rows(tokens, world, config.micro_tokens, hidden_size, squares)[rank]:
        part[row] = answer_logps(model, documents, records[row], device).double().cpu()
    dist.all_reduce(part)  # each record is one rank's, and zero on the others
    return part


@torch.no_grad()
def reference_logps(model: Llama, documents: Documents | None, config, weights: str,
                    device: torch.device) -> torch.Tensor:  # fmt: skip
    """Log-probabilities (n, 2) fp64 of the answers under the model as it is now, before training.

    The same code, packing and precision as the policy's. They are kept beside the data or, where
    that folder cannot be written, in the output folder, every thousand pairs: a computation that
    was cut short goes on, and a second run needs none. weights: its folder's `weights_key`.
    Raises `RunError` where one of them is not finite, and on rank 0 if no disk takes them.
    """
    rank, count = dist.get_rank(), len(documents or ())
    if not count:
        return torch.zeros(0, 2, dtype=torch.float64)
    paths = reference_files(model, documents, config, weights)
    logps = torch.full((count, 2), math.nan, dtype=torch.float64)  # NaN: not computed yet
    if rank == 0:
        logps = read_reference(paths, logps)
    dist.broadcast(logps, src=0)
    bar = progress_bar(total=count, desc="reference", unit="pair", leave=False, disable=rank > 0)
    for begin in range(0, count, 1024):
        pairs = np.arange(begin, min(begin + 1024, count))
        if logps[pairs].isnan().any():
            part = summed_logps(model, documents, pairs, config, device)
            check_reference(part, documents, pairs)
            logps[pairs] = part
            if rank == 0:
                write_reference(paths, logps)
        bar.update(len(pairs))
    bar.close()
    return logps


def check_reference(logps: torch.Tensor, documents: Documents, pairs: np.ndarray) -> None:
    """Raise `RunError`, naming them, where pairs have log-probabilities that are not finite."""
    bad = pairs[~logps.isfinite().all(1).numpy()]
    if len(bad):
        names = ", ".join(documents.names(bad[:5]))
        raise RunError(
            f"the model gives {len(bad):,} of the first {amount(pairs[-1] + 1, 'pairs')} "
            f"log-probabilities that are not finite, among them {names}"
        )
