"""Log-probabilities of answers: the policy's, with gradients, and the reference's, made once.

Both come from `answer_logps`, so that before the first update they are equal but for rounding.
Called by dpo.py.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint.reference_file import read_reference, reference_files, write_reference
from data import pack_row, plan_rows
from program.errors import RunError


def answer_logps(model, documents, pairs, device):
    """Summed log-probability (n, 2) of the chosen and the rejected answer of each of n pairs.

    The pairs are one packed row, in which a prompt stands once. Differentiable; the reference is
    computed by this, too.
    """
    arrays = pack_row(documents.sequences(pairs), documents.shared[pairs].ravel())
    nll = model(**{name: torch.from_numpy(a).to(device) for name, a in arrays.items()})  # (N,)
    answers = nll.split(documents.trained_counts[pairs].ravel().tolist())
    if not answers:  # an empty row: its (empty) nll must reach backward on this rank, too
        return nll.new_zeros(0, 2) + nll.sum()
    return torch.stack([-answer.sum() for answer in answers]).view(-1, 2)


@torch.no_grad()
def reference_logps(model, documents, config, weights, device):
    """Log-probabilities (n, 2) fp64 of the answers under the model as it is now, before training.

    The same code, packing and precision as the policy's. They are kept beside the data or, where
    that folder cannot be written, in the output folder, every thousand pairs: a computation that
    was cut short goes on, and a second run needs none. weights: `weights_key` of the model's
    folder. Raises `RunError` where one of them is not finite, and on rank 0 if no disk takes them.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    paths = reference_files(model, documents, config, weights)
    logps = torch.full((len(documents), 2), math.nan, dtype=torch.float64)  # NaN: not computed yet
    if rank == 0:
        logps = read_reference(paths, logps)
    dist.broadcast(logps, src=0)
    bar = tqdm(total=len(documents), desc="reference", unit="pair", leave=False, disable=rank > 0)
    for begin in range(0, len(documents), 1024):
        pairs = np.arange(begin, min(begin + 1024, len(documents)))
        if logps[pairs].isnan().any():
            part = torch.zeros(len(pairs), 2, dtype=torch.float64)
            tokens, squares = documents.tokens[pairs], documents.squares[pairs]
            hidden_size = model.config.hidden_size
            rows = plan_rows(tokens, world, config.micro_tokens, hidden_size, squares)[rank]
            for row in rows:
                part[row] = answer_logps(model, documents, pairs[row], device).double().cpu()
                bar.update(len(row))
            dist.all_reduce(part)  # each pair is one rank's, and zero on the others
            check_reference(part, documents, pairs)
            logps[pairs] = part
            if rank == 0:
                write_reference(paths, logps)
        bar.update(begin + len(pairs) - bar.n)  # and those of the other ranks
    bar.close()
    return logps


def check_reference(logps, documents, pairs):
    """Raise `RunError`, naming them, where pairs have log-probabilities that are not finite."""
    bad = pairs[~logps.isfinite().all(1).numpy()]
    if len(bad):
        names = ", ".join(documents.names(bad[:5]))
        raise RunError(
            f"the model gives {len(bad):,} of the first {pairs[-1] + 1:,} pairs log-probabilities "
            f"that are not finite, among them {names}"
        )
