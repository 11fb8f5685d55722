"""Log-probabilities of answers: the policy's, with gradients, and the reference's, made once.

Both come from `answer_logps`, so that before the first update they are equal but for rounding. The
reference's stand beside the data under a hash of all that decides them. Called by dpo.py.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint.weights import weight_files
from data import pack_row, plan_rows
from program.errors import RunError, one_line
from program.files import digest
from program.ranks import gather_lists, own_share
from tokens.token_cache import open_locked


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
def reference_logps(model, documents, config, weights, device):
    """Log-probabilities (n, 2) fp64 of the answers under the model as it is now, before training.

    The same code, packing and precision as the policy's. They are kept beside the data or, where
    that folder cannot be written, in the output folder, every thousand pairs: a computation that
    was cut short goes on, and a second run needs none. weights: `weights_key` of the model's
    folder. Raises `RunError` where one of them is not finite, and on rank 0 if no disk takes them.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    lengths = documents.record_lengths  # (n,) tokens of a pair
    paths = reference_files(model, documents, config, weights)
    logps = torch.full((len(lengths), 2), math.nan, dtype=torch.float64)  # NaN: not computed yet
    if rank == 0:
        logps = read_reference(paths, logps)
    dist.broadcast(logps, src=0)
    bar = tqdm(total=len(lengths), desc="reference", unit="pair", leave=False, disable=rank > 0)
    for begin in range(0, len(lengths), 1024):
        pairs = np.arange(begin, min(begin + 1024, len(lengths)))
        if logps[pairs].isnan().any():
            own = torch.zeros(len(pairs), 2, dtype=torch.float64)
            hidden_size = model.config.hidden_size
            for row in plan_rows(lengths[pairs], world, config.micro_tokens, hidden_size)[rank]:
                own[row] = answer_logps(model, documents, pairs[row], device).double().cpu()
                bar.update(len(row))
            dist.all_reduce(own)  # each pair is one rank's, and zero on the others
            check_reference(own, documents, pairs)
            logps[pairs] = own
            if rank == 0:
                write_reference(paths, logps)
        bar.update(begin + len(pairs) - bar.n)  # and those of the other ranks
    bar.close()
    return logps


def check_reference(logps, documents, pairs):
    """Raise `RunError`, naming them, where pairs have log-probabilities that are not finite."""
    bad = pairs[~logps.isfinite().all(1).numpy()]
    if len(bad):
        names = ", ".join(documents.names(2 * bad[:5]))
        raise RunError(
            f"the model gives {len(bad):,} of the first {pairs[-1] + 1:,} pairs log-probabilities "
            f"that are not finite, among them {names}"
        )


# ---- What is kept on disk


def weights_key(folder):
    """Hash of the weights of an HF folder, each rank reading its share; every rank calls it."""
    digests = {path.name: digest(path) for path in own_share(weight_files(Path(folder)))}
    return short_hash(sorted(gather_lists(list(digests.items()))))


def short_hash(facts):
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def reference_files(model, documents, config, weights):
    """Where the reference may be kept, under a hash of all that decides it."""
    shape = dataclasses.asdict(model.config)
    key = short_hash([weights, shape, documents.key, config.max_seq_len, config.dtype])
    name = f"{documents.paths[0].name}.reference-{key}"
    return [documents.paths[0].parent / name, Path(config.out) / name]


def read_reference(paths, unknown):
    """The reference that is kept in the first of `paths`; `unknown` where none is, or is whole."""
    for path in paths:
        with contextlib.suppress(OSError):  # most often: no such file
            content = path.read_bytes()
            if content[:32] == hashlib.sha256(content[32:]).digest():
                return torch.frombuffer(bytearray(content[32:]), dtype=torch.float64).view(-1, 2)
            print(f"warning: {path} is damaged and is made anew", file=sys.stderr)
    return unknown


def write_reference(paths, logps):
    """Write a SHA-256 and the numbers to the first of `paths` that takes them, whole or not."""
    content = logps.numpy().tobytes()
    for path in paths:
        aside = path.with_name(path.name + ".partial")
        try:
            # Two runs may start at once on the same data: both compute, one at a time writes.
            with open_locked(f"{path}.lock") as lock:
                try:
                    aside.write_bytes(hashlib.sha256(content).digest() + content)
                    os.replace(aside, path)
                finally:
                    aside.unlink(missing_ok=True)
                    os.unlink(lock.name)
            return
        except OSError as error:
            refusal = error
    raise RunError(f"the reference's log-probabilities could not be kept ({one_line(refusal)})")
