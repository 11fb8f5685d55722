"""Log-probabilities of answers: the policy's, with gradients, and the reference's, made once.

Both come from `answer_logps`, so that before the first update they are equal but for rounding. The
reference's stand beside the data under a hash of all that decides them. Called by dpo.py.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import pack_row, plan_rows
from program.errors import RunError, one_line
from program.files import written_aside


def answer_logps(model, documents, pairs, device):
    """Summed log-probability (n, 2) of the chosen and the rejected answer of each of n pairs.

    The 2n documents are one packed row. Differentiable; the reference is computed by this, too.
    """
    arrays = pack_row(documents.sequences(pairs))
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
    lengths = documents.lengths.sum(1)  # (n,) tokens of a pair
    paths = reference_files(model, documents, config, weights)
    logps = torch.full((len(lengths), 2), math.nan, dtype=torch.float64)  # NaN: not computed yet
    if rank == 0:
        logps = read_reference(paths, logps)
    dist.broadcast(logps, src=0)
    bar = tqdm(total=len(lengths), desc="reference", unit="pair", leave=False, disable=rank > 0)
    for begin in range(0, len(lengths), 1024):
        pairs = np.arange(begin, min(begin + 1024, len(lengths)))
        if logps[pairs].isnan().any():
            part = torch.zeros(len(pairs), 2, dtype=torch.float64)
            hidden_size = model.config.hidden_size
            for row in plan_rows(lengths[pairs], world, config.micro_tokens, hidden_size)[rank]:
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


def reference_files(model, documents, config, weights):
    """Where the reference may be kept, under a hash of all that decides it."""
    shape = dataclasses.asdict(model.config)
    facts = json.dumps([weights, shape, documents.key, config.max_seq_len, config.dtype])
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    name = f"{documents.paths[0].name}.reference-{key}"
    return [documents.paths[0].parent / name, Path(config.out) / name]


def read_reference(paths, unknown):
    """The reference kept in the first of `paths` that is there; `unknown` where none is whole."""
    for path in paths:
        with contextlib.suppress(OSError):  # most often: no such file
            content = path.read_bytes()
            if content[:32] == hashlib.sha256(content[32:]).digest():
                return torch.frombuffer(bytearray(content[32:]), dtype=torch.float64).view(-1, 2)
            print(f"warning: {path} is damaged and is made anew", file=sys.stderr)
    return unknown


def write_reference(paths, logps):
    """Write a SHA-256 and the numbers to the first of `paths` that takes them."""
    content = logps.numpy().tobytes()
    for path in paths:
        try:
            with written_aside(path, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            return
        except OSError as error:
            refusal = error
    raise RunError(f"the reference's log-probabilities could not be kept ({one_line(refusal)})")
