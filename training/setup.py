"""What sft.py and dpo.py do before their loops: here everything that can be wrong is found."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adapters.dropout import Dropout
from adapters.lora import put_in
from checkpoint.config import read_config
from checkpoint.resume import remove_checkpoints
from checkpoint.run_folder import check_output, lock_output, start_records, unlock_output
from checkpoint.weights import find_tensors, weights_key
from data import schedule, update_count
from model import Llama
from program.errors import InputError
from program.flags import check_flags, run_facts
from program.hardware import environment
from tokens.documents import Documents, amount, check_micro_tokens
from tokens.for_transformers import check_tokenizer
from tokens.tokenizer import Tokenizer


@dataclass
class Run:
    """What a loop works on."""

    out: Path  # the output folder
    metrics: Path  # the log in it, one record an update
    tokenizer: Tokenizer
    model: Llama  # on the meta device: it has no memory yet
    documents: Documents
    dropout: Dropout  # of the adapters, if there are any; the loop tells it each update's number
    facts: dict[str, Any]  # what tells this run from others: flags, hashes of data and weights
    lock: Any  # held until this process ends, so that no other run writes to `out`


def open_run(config, encode_record, pairs=False):
    """Check flags, model, tokenizer, output folder and data, and return them as a `Run`.

    encode_record: `encode_conversation` or, with pairs=True, `encode_pair`; then the model is also
    the reference, and its weights are part of the facts. Raises `InputError` for whatever is
    wrong; until then nothing is written but the token cache. Every rank calls it; rank 0 prints
    what the data are.
    """
    check_flags(config)
    out, rank = Path(config.out), dist.get_rank()
    model_config = read_config(config.model, quantized=config.quantize is not None)
    tokenizer = Tokenizer(config.model)
    tokenizer.check_fits(model_config.vocab_size)
    as_text = check_tokenizer(tokenizer, config.model)
    with torch.device("meta"):
        model = Llama(model_config)
    dropout = put_in(model, config)
    find_tensors(model, config.model, quantized=config.quantize is not None)
    facts, lock = run_facts(config), None
    if rank == 0:
        check_output(out, facts, model)
    documents = Documents(
        config.data, config.model, config.max_seq_len, encode_record, out, 2 if pairs else 1
    )
    check_micro_tokens(documents, config.micro_tokens)
    facts["data"] = documents.key
    if pairs or config.lora_rank:
        facts["weights"] = weights_key(config.model)
    if rank == 0:
        # Now that the data are known: that of a signal, and those of --save-every.
        _, total = update_count(len(documents), config.batch_size, config.epochs)
        saves = (min(total, config.max_steps or total) - 1) // (config.save_every or total)
        checkpoints = 1 + min(config.keep, saves)
        check_output(out, facts, model, checkpoints)
        lock = lock_output(out)
        try:
            check_output(out, facts, model, checkpoints)  # what did another run do meanwhile?
        except InputError:
            unlock_output(out, lock)
            raise
        print(documents.summary())
        print_changes(documents.lengths.max(), model_config.max_position_embeddings, as_text)
        if len(documents) < config.batch_size:
            print(
                f"warning: {amount(len(documents), documents.kind)} "
                f"{'are' if len(documents) > 1 else 'is'} fewer than --batch-size "
                f"{config.batch_size:,}; an update takes them all, one an epoch",
                file=sys.stderr,
            )
    return Run(out, out / "metrics.jsonl", tokenizer, model, documents, dropout, facts, lock)


def print_changes(longest, positions, as_text):
    """Say where the model that is saved at the end will differ from the base, not in its weights.

    as_text: the texts that are tokens of the base's, and not of ours.
    """
    if longest > positions:
        print(
            f"the longest sequence has {longest:,} tokens, the base's max_position_embeddings is "
            f"{positions:,}; the saved model's will be {longest:,}"
        )
    if as_text:
        listed = ", ".join(as_text[:5]) + (f" and {len(as_text) - 5} more" * (len(as_text) > 5))
        print(f"tokens of the base, plain text here and in the saved tokenizer: {listed}")


def start_log(run, config, first, device):
    """Begin metrics.jsonl, or go on with it after `first` updates, and say so; rank 0 calls it."""
    record = {"event": "start", "config": dataclasses.asdict(config)}
    record |= {"environment": environment(device, dist.get_world_size()), "run": run.facts}
    start_records(run.metrics, first, record)
    print(
        schedule(len(run.documents), run.documents.kind, config.batch_size, config.epochs)
        + (f"; continued after {first:,}" if first else "")
    )


def finish_run(run, config):
    """After `save_hf`: tidy the output folder, free it, and say what is in it; rank 0 acts."""
    if dist.get_rank() == 0:
        if not config.keep_checkpoints:
            remove_checkpoints(run.out)
        unlock_output(run.out, run.lock)
        print(f"{run.out}: the model for transformers and vLLM, and {run.metrics.name}")
