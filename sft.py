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
import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint.config import read_config
from checkpoint.resume import resume_run, save_run
from checkpoint.run_folder import append_record, check_output, lock_output, start_records
from checkpoint.weights import find_tensors, load_hf, save_hf
from data import (
    Documents,
    check_micro_tokens,
    pack_row,
    plan_rows,
    update_count,
    update_members,
)
from demo import tasks as demo
from demo.compare import compare
from model import Llama
from program.errors import reported
from program.flags import check_flags, parse_args, resolve, run_facts
from program.ranks import start, sum_over_ranks, watch_signals
from tokens.for_transformers import fast_tokenizer
from tokens.records import encode_conversation
from tokens.tokenizer import Tokenizer
from training.parallel import shard
from training.update import (
    check_finite,
    clip_gradients,
    environment,
    learning_rate,
    make_optimizer,
    model_flops,
    peak_flops,
    peak_memory_gib,
)


@dataclass(frozen=True)
class SFTConfig:
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
    max_steps: int = 0  # stop after so many updates of the full schedule (0: all)
    save_every: int = 0  # updates between resumable checkpoints (0: only when stopped by a signal)
    keep: int = 2  # resumable checkpoints that stay
    seed: int = 42  # of the order of the data
    dtype: str | None = None  # bfloat16 or float32, to compute in (default: bfloat16 on a GPU)
    recompute: bool | None = None  # activations again in backward, per block (default: on a GPU)
    compile: bool | None = None  # torch.compile per block (default: on a GPU)


def main(flags):
    rank, world, device = start()
    say = print if rank == 0 else lambda *_: None
    if is_demo := not {"model", "data"} & flags.keys():
        flags = demo.SFT | flags
        if rank == 0:
            demo.make()
            shutil.rmtree(demo.SFT["out"], ignore_errors=True)
        dist.barrier()
    config = resolve(SFTConfig(**flags), device)

    # Everything that can be wrong is found before the first update, and before anything is written.
    check_flags(config)
    out, metrics = Path(config.out), Path(config.out) / "metrics.jsonl"
    model_config = read_config(config.model)
    tokenizer = Tokenizer(config.model)
    tokenizer.check_fits(model_config.vocab_size)
    fast_tokenizer(tokenizer, Path(config.model) / "tokenizer.json")  # it is needed at the end
    with torch.device("meta"):
        model = Llama(model_config)
    find_tensors(model, config.model)
    run = run_facts(config)
    if rank == 0:
        check_output(out, run, model, config.save_every)
    documents = Documents(config.data, config.model, config.max_seq_len, encode_conversation, out)
    check_micro_tokens(documents, config.micro_tokens)
    run["data"] = documents.key
    if rank == 0:
        lock = lock_output(out)  # noqa: F841, held until this process ends
        check_output(out, run, model, config.save_every)  # again: what the lock's last holder left

    per_epoch, total = update_count(len(documents), config.batch_size, config.epochs)
    last = min(total, config.max_steps or total)
    shard(model, device, getattr(torch, config.dtype), config.recompute, config.compile)
    optimizer = make_optimizer(model, config)
    first = resume_run(out, model, optimizer)
    if first == 0:
        load_hf(model, config.model)
    if rank == 0:
        record = {"event": "start", "config": dataclasses.asdict(config)}
        record |= {"environment": environment(device, world), "run": run}
        start_records(metrics, first, record)
    say(documents.summary())
    if rank == 0 and len(documents) < config.batch_size:
        print(
            f"warning: {len(documents):,} conversations are fewer than --batch-size "
            f"{config.batch_size:,}; an update takes them all, one an epoch",
            file=sys.stderr,
        )
    say(
        f"{total:,} updates of {config.batch_size} conversations, {per_epoch:,} an epoch"
        + (f", continued after {first:,}" if first else "")
    )

    peak = peak_flops(device)
    signals, stop = watch_signals(), False
    bar = tqdm(total=last, initial=first, unit="update", disable=rank > 0, dynamic_ncols=True)
    for step in range(first, last):
        started = time.perf_counter()
        epoch, members = update_members(len(documents), config.batch_size, config.seed, step)
        lengths, trained = documents.lengths[members], documents.trained_counts[members].sum()
        rows = plan_rows(lengths, world, config.micro_tokens, model_config.hidden_size)[rank]

        nll_sum = torch.zeros((), dtype=torch.float64, device=device)
        for row in rows:
            arrays = pack_row([documents[members[i]] for i in row])
            batch = {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}
            nll = model(**batch, uniform_gradient=True)  # (N,)
            # loss = sum of nll / trained tokens, both over the whole update: all rows and ranks.
            # FSDP averages gradients over ranks; times their number makes that average a sum.
            (nll.sum() * (world / trained)).backward()
            nll_sum += nll.detach().sum()
        grad_norm = clip_gradients(model, config.clip)
        # One exchange an update: the loss, and whether any rank was told to stop.
        loss, stop = sum_over_ranks([nll_sum / trained, len(signals)], device)
        check_finite(step + 1, loss, grad_norm, documents, members)

        lr = learning_rate(step, total, config.lr, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        seconds = time.perf_counter() - started
        record = {
            "step": step + 1,
            "epoch": epoch + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "trained_tokens": int(trained),
            "tokens": int(lengths.sum()),
            "tokens_per_second": int(lengths.sum()) / seconds,
            "seconds": seconds,
            "peak_memory_gib": peak_memory_gib(device),
        }
        shown = f"loss {loss:.4f}, lr {lr:.2e}, {record['tokens_per_second']:,.0f} tokens/s"
        if peak:
            record["mfu"] = model_flops(model_config, lengths, trained) / seconds / peak / world
            shown += f", MFU {record['mfu']:.1%}"
        bar.set_postfix_str(shown, refresh=False)
        bar.update()
        if rank == 0:
            append_record(metrics, record)
        if stop or (config.save_every and (step + 1) % config.save_every == 0 and step + 1 < last):
            save_run(out, step + 1, model, optimizer, config.keep)
        if stop:
            break
    bar.close()
    if stop:
        say(f"stopped by a signal after update {step + 1:,}; the same command continues from there")
        sys.exit(128 + (signals or [15])[0])

    save_hf(model, tokenizer, config.model, out)
    say(f"{out}: the model for transformers and vLLM, and {metrics.name}")
    if is_demo and rank == 0:
        compare(config.model, out)


if __name__ == "__main__":
    with reported():
        main(parse_args(SFTConfig))
        dist.destroy_process_group()
