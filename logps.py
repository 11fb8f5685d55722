"""Log-probabilities of answers: the policy's, with gradients, and the reference's, made once.

Both come from `answer_logps`, so that before the first update they are equal but for rounding. The
reference's stand beside the data under a hash of all that decides them. Called by dpo.py.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import digest, own_share, weight_files
from data import pack_row, plan_rows
from parallel import gather_lists


def answer_logps(model, documents, pairs, device):
    """Summed log-probability (n, 2) of the chosen and the rejected answer of each of n pairs.

    The 2n documents are one packed row. Differentiable; the reference is computed by this, too.
    """
    members = [2 * pair + side for pair in pairs for side in (0, 1)]
    arrays = pack_row([documents[i] for i in members])
    nll = model(**{name: torch.from_numpy(a).to(device) for name, a in arrays.items()})  # (N,)
    # An empty row has no pairs, but its (empty) nll must reach backward on this rank, too.
    answers = nll.split(documents.trained_counts[members].tolist())
    logps = [-answer.sum() for answer in answers]
    return torch.stack(logps).view(-1, 2) if logps else nll.new_zeros(0, 2) + nll.sum()


@torch.no_grad()
def reference_logps(model, documents, config, device):
    """Log-probabilities (n, 2) fp64 of the answers under the model as it is now, before training.

    The same code, packing and precision as the policy's. They are kept beside the data or, where
    that folder cannot be written, in the output folder, every thousand pairs: a computation that
    was cut short goes on, and a second run needs none.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    lengths = documents.lengths.reshape(-1, 2).sum(1)  # (n,) tokens of a pair
    paths = reference_files(documents, config)
    logps = torch.full((len(lengths), 2), math.nan, dtype=torch.float64)
    if rank == 0:
        for path in paths:
            with contextlib.suppress(OSError, ValueError):
                logps.copy_(torch.from_numpy(np.load(path)))
    dist.broadcast(logps, src=0)
    bar = tqdm(total=len(lengths), desc="reference", unit="pair", leave=False, disable=rank > 0)
    for begin in range(0, len(lengths), 1024):
        pairs = np.arange(begin, min(begin + 1024, len(lengths)))
        if logps[pairs].isnan().any():
            own = torch.zeros(len(pairs), 2, dtype=torch.float64)
            hidden_size = model.config.hidden_size
            for row in plan_rows(lengths[pairs], world, config.micro_tokens, hidden_size)[rank]:
                own[row] = answer_logps(model, documents, pairs[row], device).double().cpu()
            dist.all_reduce(own)  # each pair is one rank's, and zero on the others
            logps[pairs] = own
            if rank == 0:
                save_aside(paths, logps)
        bar.update(len(pairs))
    bar.close()
    return logps


def reference_files(documents, config):
    """Where the reference may be kept, under a hash of all that decides it."""
    folder = Path(config.model)
    digests = {path.name: digest(path) for path in own_share(weight_files(folder))}
    weights = sorted(gather_lists(list(digests.items())))
    facts = [weights, documents.key, config.max_seq_len, config.dtype]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    name = f"{documents.paths[0].name}.reference-{key}.npy"
    return [documents.paths[0].parent / name, Path(config.out) / name]


def save_aside(paths, logps):
    """Write the reference to the first of `paths` that can be written, whole or not at all."""
    for path in paths:
        aside = path.with_name(path.name + ".partial")
        try:
            with open(aside, "wb") as file:
                np.save(file, logps.numpy())
            os.replace(aside, path)
            return
        except OSError as error:
            refusal = error
    raise refusal
