"""The held-out data: which they are, when they are measured, and their log-probabilities.

The loops turn log-probabilities into what they log: each has its own loss.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from checkpoint.run_folder import append_record
from program.errors import InputError, RunError, amount
from program.progress import LogLines
from program.ranks import sum_over_ranks
from tokens.documents import Documents, check_micro_tokens
from training.reference import summed_logps


def open_documents(
    config, encode_record: Callable, fallback: Path, per_record: int
) -> tuple[Documents, Documents | None, str]:
    """(documents to train on, held-out documents or None, text that says what they are).

    The arguments are those of `Documents`. Raises `InputError` for bad data, and where one of the
    two has nothing in it.
    """

    def opened(paths):
        documents = Documents(
            paths, config.model, config.max_seq_len, encode_record, fallback, per_record,
            config.too_long,
        )  # fmt: skip
        check_micro_tokens(documents, config.micro_tokens)
        return documents

    documents = opened(config.data)
    held_out, texts = None, [documents.summary()]
    if config.eval_data:
        held_out = opened(config.eval_data)
        texts.append(f"held out: {held_out.summary()}")
    elif config.eval_share:
        chosen = drawn(documents, config.seed, config.eval_share)
        if chosen.all() or not chosen.any():
            raise InputError(
                f"--eval-share {config.eval_share} takes {'all' if chosen.all() else 'none'} of "
                f"the {amount(len(documents), documents.kind)}, expected some of them"
            )
        documents, held_out = documents.part(~chosen), documents.part(chosen)
        texts.append(
            f"held out of them: {amount(len(held_out), held_out.kind)}, "
            f"{amount(held_out.trained_counts.sum(), 'tokens')} to be predicted"
        )
    return documents, held_out, "\n".join(texts)


def drawn(documents: Documents, seed: int, share: float) -> np.ndarray:
    """Whether each record is held out, (records,) of bool, as (seed, file, record) alone decides.

    So neither ranks nor epochs matter, nor how many records are too long; and what a small share
    holds out, a larger one does, too.
    """
    draws = np.empty(len(documents))
    for file in np.unique(documents.file[:, 0]):
        own = documents.file[:, 0] == file
        numbers = documents.numbers[own, 0]
        # The 1 keeps the stream apart from those of the epochs' orders.
        draws[own] = np.random.default_rng([seed, file, 1]).random(numbers.max() + 1)[numbers]
    return draws < share


def is_due(run, config, step: int) -> bool:
    """Whether the held-out loss is measured after `step` updates: after the last one, always."""
    every = config.eval_every or run.per_epoch
    return run.held_out is not None and step > 0 and (step % every == 0 or step == run.last)


@torch.no_grad()
def held_out_logps(
    run, config, step: int, signals: list[int], device: torch.device
) -> torch.Tensor | None:
    """Summed log-probabilities (n, per_record) fp64 of the held-out records, on every rank.

    None where they are not due after `step` updates, or where a signal asks any rank to stop: then
    the run that goes on computes them. The same packing as in training; no random state moves.
    """
    if not is_due(run, config, step):
        return None
    run.model.eval()
    parts, few = [], 64 * dist.get_world_size()  # between two looks at the signals, a second or so
    chunks = np.split(np.arange(len(run.held_out)), range(few, len(run.held_out), few))
    for records in chunks:
        if sum_over_ranks([len(signals)], device)[0]:
            break
        parts.append(summed_logps(run.model, run.held_out, records, config, device))
    run.model.train()
    for module in run.model.modules():  # or `parameters()` would be FSDP's gathered copies
        if isinstance(module, FSDPModule):
            module.reshard()
    return torch.cat(parts) if len(parts) == len(chunks) else None


def log_held_out(run, step: int, metrics: dict[str, float], bar: tqdm | LogLines) -> None:
    """Add a record of the held-out data to metrics.jsonl, and its loss to the progress bar.

    Raises `RunError` where the loss is not finite.
    """
    if not math.isfinite(metrics["loss"]):
        raise RunError(f"the held-out loss after update {step} is {metrics['loss']}")
    if not bar.disable:  # rank 0
        append_record(run.metrics, {"event": "eval", "step": step, **metrics})
        bar.set_description_str(f"held-out loss {metrics['loss']:.4f}", refresh=False)
