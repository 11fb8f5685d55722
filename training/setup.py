"""What sft.py and dpo.py do before and after their loops; whatever is wrong is found before."""

import dataclasses
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adapters.dropout import Dropout
from adapters.lora import put_in
from checkpoint.config import read_config
from checkpoint.resume import remove_checkpoints
from checkpoint.run_folder import (
    check_output,
    exported_models,
    lock_output,
    start_records,
    unlock_output,
)
from checkpoint.weights import find_tensors, weights_key
from data import schedule, update_count
from model import Llama
from planning.memory import check_layout
from program.errors import InputError, amount
from program.flags import check_flags, resolve, run_facts
from program.hardware import environment
from tokens.documents import Documents
from tokens.for_transformers import check_tokenizer
from tokens.tokenizer import Tokenizer
from training.flags import RunFlags
from training.held_out import open_documents
from training.layout import lay_out, layout_of
from training.saving import adapters_alone, exports_at_once, going_on
from training.trackers import check_trackers, finish_trackers, start_trackers


@dataclass
class Run:
    """What a loop works on."""

    config: Any  # the loop's flags, with all defaults filled in
    reshard: bool | None  # whether gathered weights are freed after forward (see `shard`)
    out: Path  # the output folder
    metrics: Path  # the log in it, one record an update
    tokenizer: Tokenizer
    model: Llama  # on the meta device: it has no memory yet
    documents: Documents  # what is trained
    held_out: Documents | None  # what the loss is measured on besides
    dropout: Dropout  # of the adapters, if there are any; the loop tells it each update's number
    per_epoch: int  # updates
    total: int  # updates of the schedule
    last: int  # the update after which --max-steps, or the schedule, ends the run
    facts: dict[str, Any]  # what tells this run from others: flags, hashes of data and weights
    trackers: list[Any]  # processes that read the log; they end with this one
    lock: Any  # held until this process ends, so that no other run writes to `out`


def open_run(config, device: torch.device, encode_record: Callable, pairs: bool = False) -> Run:
    """Check flags, model, tokenizer, output folder and data, and return them as a `Run`.

    encode_record: `encode_conversation` or, with pairs=True, `encode_pair`; then the model is also
    the reference, and its weights are part of the facts. Raises `InputError` for whatever is
    wrong; until then nothing is written but the token cache. Every rank calls it; rank 0 prints
    what the data are.
    """
    config = resolve(config, device)
    check_flags(config)
    check_trackers(config)
    out, rank = Path(config.out), dist.get_rank()
    model_config = read_config(config.model, quantized=config.quantize is not None)
    check_layout(model_config, layout_of(config))
    tokenizer = Tokenizer(config.model)
    tokenizer.check_fits(model_config.vocab_size)
    as_text = check_tokenizer(tokenizer, config.model)
    with torch.device("meta"):
        model = Llama(model_config)
    dropout = put_in(model, config)
    find_tensors(model, config.model, quantized=config.quantize is not None)
    facts = run_facts(config)
    if rank == 0:
        check_output(out, facts, model, last=config.max_steps or math.inf)
    documents, held_out, texts = open_documents(config, encode_record, out, 2 if pairs else 1)
    config, reshard = lay_out(config, model_config, documents, device)
    per_epoch, total = update_count(len(documents), config.batch_size, config.epochs)
    last = min(total, config.max_steps or total)
    run = Run(
        config, reshard, out, out / "metrics.jsonl", tokenizer, model, documents, held_out,
        dropout, per_epoch, total, last, facts, trackers=[], lock=None,
    )  # fmt: skip
    facts["data"] = documents.key
    if pairs or config.lora_rank:
        facts["weights"] = weights_key(config.model)
    if rank == 0:
        # Now that the data are known: that of a signal, and those of --save-every.
        saves = (last - 1) // (config.save_every or total)
        need = {"checkpoints": 1 + min(config.keep, saves), "last": last}
        need |= {"exports": exports_at_once(run, config), "adapters_alone": adapters_alone(config)}
        check_output(out, facts, model, **need)
        run.lock = lock_output(out)
        try:
            check_output(out, facts, model, **need)  # what did another run do meanwhile?
        except InputError:
            unlock_output(out, run.lock)
            raise
        print(texts)
        print_changes(documents.lengths.max(), model_config.max_position_embeddings, as_text)
        if len(documents) < config.batch_size:
            print(
                f"warning: {amount(len(documents), documents.kind)} "
                f"{'are' if len(documents) > 1 else 'is'} fewer than --batch-size "
                f"{config.batch_size:,}; an update takes them all, one an epoch",
                file=sys.stderr,
            )
    return run


def print_changes(longest: int, positions: int, as_text: list[str]) -> None:
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


def start_log(run: Run, config, first: int, device: torch.device) -> None:
    """Begin metrics.jsonl, or go on with it after `first` updates, and say so; rank 0 acts.

    What an earlier start of the program left of later updates goes, and so does config.json: while
    a run goes on, its folder holds no whole model.
    """
    if dist.get_rank() > 0:
        return
    (run.out / "config.json").unlink(missing_ok=True)
    for place in exported_models(run.out):
        if int(place.name.removeprefix("step-")) > first:
            shutil.rmtree(place)
    record = {"event": "start", "config": dataclasses.asdict(config)}
    record |= {"environment": environment(device, dist.get_world_size()), "run": run.facts}
    start_records(run.metrics, first, record)
    run.trackers = start_trackers(run.out, config)
    print(
        schedule(len(run.documents), run.documents.kind, config.batch_size, config.epochs)
        + (f"; continued after {first:,}" if first else "")
    )


def finish_run(run: Run, config: RunFlags) -> None:
    """After `save_hf`: tidy the output folder, free it, and say what is in it; rank 0 acts."""
    if dist.get_rank() == 0:
        ended_early = run.last < run.total
        if ended_early:
            print(
                f"--max-steps ended the run after {run.last:,} of {run.total:,} updates; "
                + going_on(config, "the same command with a larger one goes on")
            )
        if not config.keep_checkpoints:
            remove_checkpoints(run.out, but_newest=ended_early)
        finish_trackers(run.trackers)
        unlock_output(run.out, run.lock)
        print(f"{run.out}: the model for transformers and vLLM, and {run.metrics.name}")
