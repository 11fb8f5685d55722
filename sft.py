"""Supervised fine-tuning of a Llama 2 checkpoint on conversations, as Tulu 2 did it.

    torchrun sft.py                                          the demo: a tiny model, two minutes
    torchrun --nproc_per_node 8 sft.py --model DIR --data FILE --out DIR

Every update is a number of conversations, packed into rows without padding and spread over the
ranks; the loss is the mean negative log-likelihood of their trained tokens (the assistant's words
and the EOS after them). The result is a Hugging Face folder for transformers, vLLM and dpo.py.

Source: Ivison et al. 2023 (arXiv 2311.10702), appendix B; EasyLM llama_train.py.
"""

from program import threads  # noqa: F401, before torch

# isort: split
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint.resume import resume_run
from checkpoint.run_folder import append_record
from checkpoint.weights import load_hf, save_hf
from data import pack_row, plan_rows, update_members
from demo import command as demo
from program.errors import reported
from program.flags import parse_args
from program.progress import progress_bar
from program.ranks import leave, start, sum_over_ranks
from program.signals import watch_signals
from tokens.documents import Documents
from tokens.records import encode_conversation
from training import update
from training.flags import LESS_MEMORY, DataFlags, LoRAFlags, OutputFlags, RunFlags
from training.held_out import held_out_logps, log_held_out
from training.parallel import shard
from training.saving import save_or_export, stop_run
from training.setup import finish_run, open_run, start_log


@dataclass(frozen=True)
class SFTConfig(RunFlags, DataFlags, OutputFlags, LoRAFlags):
    """Defaults are Tulu 2 7B's (EasyLM docs/ai2.md; the paper's appendix B). 70B: lr 1e-5."""

    model: str | None = None  # Hugging Face folder of the Llama to start from
    data: list[str] | None = None  # conversations: .jsonl, .jsonl.gz, .json, .parquet or folders
    out: str = "runs/sft"  # output folder; an interrupted run there is continued
    epochs: int = 2  # passes over the data
    batch_size: int = 128  # conversations in one update, all ranks together
    max_seq_len: int = 8192  # tokens; a longer conversation is cut on the right
    lr: float = 2e-5  # peak learning rate
    warmup_ratio: float = 0.03  # share of all updates in which the rate rises from 0
    weight_decay: float = 0.0  # of AdamW
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    clip: float = 1.0  # largest global norm of the gradients (0: no clipping)
    micro_tokens: int = 16384  # most tokens in one forward pass of one rank
    seed: int = 42  # of the order of the data


def held_out_loss(logps: Tensor, documents: Documents) -> dict[str, float]:
    """What is logged of held-out conversations, from their answers' log-probabilities (n, 1)."""
    loss = -logps.sum().item() / documents.trained_counts.sum()
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}  # at most what a float holds


def main(flags: dict) -> None:
    rank, world, device = start()
    run = open_run(SFTConfig(**flags), device, encode_conversation)
    config, documents, model = run.config, run.documents, run.model

    # Sharded before it has memory, so that no rank ever holds the whole model.
    shard(model, config, device, run.reshard)
    optimizer = update.make_optimizer(model, config)
    # For a resumed run, too: with adapters, checkpoints do not hold the model's own weights.
    load_hf(model, config.model)
    first = resume_run(run.out, model, optimizer, config.keep)
    start_log(run, config, first, device)

    signals, stop = watch_signals(), False  # a signal is noted there, and obeyed after the update
    bar = progress_bar(total=run.last, initial=first, unit="update", disable=rank > 0)
    for step in range(first, run.last + 1):
        # What is due after `step` updates, also just after a resume: held-out loss, saving, export.
        logps = held_out_logps(run, config, step, signals, device)
        if logps is not None:
            log_held_out(run, step, held_out_loss(logps, run.held_out), bar)
        stop = save_or_export(run, config, step, first, optimizer, stop, signals)
        if stop or step == run.last:
            break

        # The batch: the update's conversations, the same on all ranks, and this rank's rows.
        started = time.perf_counter()
        run.dropout.update = step  # its draws are a function of the update
        epoch, members = update_members(len(documents), config.batch_size, config.seed, step)
        tokens, trained = documents.tokens[members], documents.trained_counts[members].sum()
        rows = plan_rows(tokens, world, config.micro_tokens, model.config.hidden_size)[rank]

        # Forward, loss, backward: row by row. The loss is the sum of nll over the trained tokens,
        # both of the whole update, all rows and ranks. FSDP averages gradients over ranks; times
        # their number makes that average a sum.
        nll_sum = torch.zeros((), dtype=torch.float64, device=device)
        for row in rows:
            arrays = pack_row(documents.sequences(members[row]))
            batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            nll = model(**batch, uniform_gradient=True)  # (N,), all weighted alike in the loss
            (nll.sum() * (world / trained)).backward()
            nll_sum += nll.detach().sum()

        # Clip. One exchange an update: the loss, and whether any rank was told to stop.
        grad_norm = update.clip_gradients(model, config.clip)
        loss, stop = sum_over_ranks([nll_sum / trained, len(signals)], device)
        update.check_finite(step + 1, loss, grad_norm, documents, members)

        # The rate, and the step.
        lr = update.learning_rate(step, run.total, config.lr, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # Log.
        seconds = time.perf_counter() - started
        record = {"step": step + 1, "epoch": epoch + 1, "loss": loss}
        record |= {"lr": lr, "grad_norm": grad_norm}
        record |= update.measurements(run, members, seconds, device, world)
        bar.set_postfix_str(update.bar_text(record), refresh=False)
        bar.update()
        if rank == 0:
            append_record(run.metrics, record)

    bar.close()
    if stop:
        stop_run(run, step, signals)

    save_hf(model, run.tokenizer, config.model, run.out, documents.lengths.max(), run.facts)
    finish_run(run, config)


if __name__ == "__main__":
    with reported(LESS_MEMORY):
        flags = parse_args(SFTConfig)
        if is_demo := demo.wanted(flags):
            flags = demo.prepare_sft(flags)
        main(flags)
        if is_demo:
            demo.show_effect(flags)
        leave()
