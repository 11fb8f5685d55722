"""Direct preference optimization of an SFT model on pairs of answers, as Tulu 2+DPO did it.

    torchrun dpo.py                                          the demo, going on from sft.py's
    torchrun --nproc_per_node 8 dpo.py --model SFT_DIR --data FILE --out DIR

The model learns to prefer one of two answers to the same prompt. It starts from, and is held near,
a reference: the SFT model itself. The reference's log-probabilities are computed once, before
training, and kept; so only one model is ever in memory.

Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; Ivison et al. 2023 (arXiv 2311.10702),
appendix B; EasyLM llama_train_dpo.py.
"""

from program import threads  # noqa: F401, before torch

# isort: split
import dataclasses
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import sft
from checkpoint.config import read_config
from checkpoint.resume import resume_run, save_run
from checkpoint.run_folder import append_record, check_output, lock_output, start_records
from checkpoint.weights import find_tensors, load_hf, save_hf
from data import (
    Documents,
    check_micro_tokens,
    plan_rows,
    update_count,
    update_members,
)
from demo import tasks as demo
from demo.compare import compare
from model import Llama
from program.errors import RunError, reported
from program.flags import check_flags, parse_args, resolve, run_facts
from program.ranks import start, sum_over_ranks, watch_signals
from tokens.for_transformers import fast_tokenizer
from tokens.records import encode_pair
from tokens.tokenizer import Tokenizer
from training.parallel import shard
from training.reference import answer_logps, reference_logps, weights_key
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
class DPOConfig:
    """Defaults are Tulu 2+DPO's at every size (EasyLM docs/ai2.md; the paper's appendix B)."""

    model: str | None = None  # Hugging Face folder of the SFT model: start and reference
    data: list[str] | None = None  # preference pairs: .jsonl, .jsonl.gz, .json, .parquet or folders
    out: str = "runs/dpo"  # output folder; an interrupted run there is continued
    epochs: int = 3  # passes over the data
    batch_size: int = 32  # pairs in one update, all ranks together
    max_seq_len: int = 8192  # tokens of prompt and answer; a longer one is cut on the right
    lr: float = 5e-7  # peak learning rate
    warmup_ratio: float = 0.1  # share of all updates in which the rate rises from 0
    weight_decay: float = 0.0  # of AdamW
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    clip: float = 1.0  # largest global norm of the gradients (0: no clipping)
    beta: float = 0.1  # how strongly the reference holds (equation 7)
    micro_tokens: int = 16384  # most tokens in one forward pass of one rank
    max_steps: int = 0  # stop after so many updates of the full schedule (0: all)
    save_every: int = 0  # updates between resumable checkpoints (0: only when stopped by a signal)
    keep: int = 2  # resumable checkpoints that stay
    seed: int = 42  # of the order of the data
    dtype: str | None = None  # bfloat16 or float32, to compute in (default: bfloat16 on a GPU)
    recompute: bool | None = None  # activations again in backward, per block (default: on a GPU)
    compile: bool | None = None  # torch.compile per block (default: on a GPU)


# Means over an update's pairs, under the names that TRL gave them.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """Loss and the two implicit rewards of each pair, all (n,), from summed log-probabilities (n,).

    L = -log sigmoid(beta * ((policy_chosen - reference_chosen)
                             - (policy_rejected - reference_rejected)))        (equation 7)
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def metric_sums(loss, chosen_rewards, rejected_rewards, logps):
    """Sums over pairs of `METRICS`, fp64, in their order."""
    margins = chosen_rewards - rejected_rewards
    columns = (loss, chosen_rewards, rejected_rewards, margins, (margins > 0).double(), *logps.T)
    return torch.stack([column.detach().double().sum() for column in columns])


def check_first_loss(step, loss, config):
    """Raise `RunError` unless the first update's loss is ln 2: policy and reference are one model.

    Other neighbours in the packed row round otherwise, and an answer's log-probability sums that up
    over its tokens: some 1e-2 in fp32, more in bf16. The loss takes beta of it.
    """
    tolerance = (1e-2 if config.dtype == "float32" else 0.5) * max(config.beta, 0.1)
    if step == 0 and not abs(loss - math.log(2)) < tolerance:
        raise RunError(
            f"the first loss is {loss:.4f}, expected ln 2 = {math.log(2):.4f}: the reference's "
            "log-probabilities are not this model's; delete the .reference-* file beside the data"
        )


def identical_answers(documents):
    """How many pairs prefer an answer to itself: they are kept, and teach nothing."""
    same_length = documents.lengths[::2] == documents.lengths[1::2]
    pairs = np.flatnonzero(same_length).tolist()
    return sum(np.array_equal(documents[2 * i][0], documents[2 * i + 1][0]) for i in pairs)


def print_counts(documents, config):
    """What the data are, with a warning where they do not make up an update."""
    print(documents.summary())
    print(f"{identical_answers(documents):,} pairs of identical answers")
    if documents.records < config.batch_size:
        print(
            f"warning: {documents.records:,} pairs are fewer than --batch-size "
            f"{config.batch_size:,}; an update takes them all, one an epoch",
            file=sys.stderr,
        )


def main(flags):
    rank, world, device = start()
    say = print if rank == 0 else lambda *_: None
    if is_demo := not {"model", "data"} & flags.keys():
        if not (Path(demo.SFT["out"]) / "config.json").is_file():
            sft.main({})
        if rank == 0:
            shutil.rmtree(demo.DPO["out"], ignore_errors=True)
        dist.barrier()
        flags = demo.DPO | flags
    config = resolve(DPOConfig(**flags), device)

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
    documents = Documents(config.data, config.model, config.max_seq_len, encode_pair, out, 2)
    check_micro_tokens(documents, config.micro_tokens)
    run |= {"data": documents.key, "weights": weights_key(config.model)}
    if rank == 0:
        lock = lock_output(out)  # noqa: F841, held until this process ends
        check_output(out, run, model, config.save_every)  # again: what the lock's last holder left

    pair_lengths = documents.record_lengths  # (n,) tokens of both documents
    if rank == 0:
        print_counts(documents, config)
    per_epoch, total = update_count(len(pair_lengths), config.batch_size, config.epochs)
    last = min(total, config.max_steps or total)
    shard(model, device, getattr(torch, config.dtype), config.recompute, config.compile)
    # Before any forward pass: after one under no_grad, parameters() may hold gathered copies.
    optimizer = make_optimizer(model, config)
    load_hf(model, config.model)
    references = reference_logps(model, documents, config, run["weights"], device)  # (n, 2)
    first = resume_run(out, model, optimizer)
    if rank == 0:
        record = {"event": "start", "config": dataclasses.asdict(config)}
        record |= {"environment": environment(device, world), "run": run}
        start_records(metrics, first, record)
    say(
        f"{total:,} updates of {config.batch_size} pairs, {per_epoch:,} an epoch"
        + (f", continued after {first:,}" if first else "")
    )

    peak = peak_flops(device)
    signals, stop = watch_signals(), False
    bar = tqdm(total=last, initial=first, unit="update", disable=rank > 0, dynamic_ncols=True)
    for step in range(first, last):
        started = time.perf_counter()
        epoch, pairs = update_members(len(pair_lengths), config.batch_size, config.seed, step)
        members = np.stack([2 * pairs, 2 * pairs + 1], 1).ravel()
        lengths, trained = documents.lengths[members], documents.trained_counts[members].sum()
        hidden_size = model_config.hidden_size
        rows = plan_rows(pair_lengths[pairs], world, config.micro_tokens, hidden_size)[rank]

        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        for row in rows:
            logps = answer_logps(model, documents, pairs[row], device)  # (n, 2)
            reference = references[pairs[row]].to(logps)
            loss, *rewards = dpo_loss(*logps.T, *reference.T, config.beta)  # (n,)
            # The mean over the update's pairs, all rows and ranks; FSDP divides by the ranks.
            (loss.sum() * (world / len(pairs))).backward()
            sums += metric_sums(loss, *rewards, logps)
        grad_norm = clip_gradients(model, config.clip)
        # One exchange an update: the metrics, and whether any rank was told to stop.
        *means, stop = sum_over_ranks([*(sums / len(pairs)), len(signals)], device)
        metric = dict(zip(METRICS, means, strict=True))
        check_finite(step + 1, metric["loss"], grad_norm, documents, members)
        check_first_loss(step, metric["loss"], config)

        lr = learning_rate(step, total, config.lr, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        seconds = time.perf_counter() - started
        record = {
            "step": step + 1,
            "epoch": epoch + 1,
            **metric,
            "lr": lr,
            "grad_norm": grad_norm,
            "trained_tokens": int(trained),
            "tokens": int(lengths.sum()),
            "tokens_per_second": int(lengths.sum()) / seconds,
            "seconds": seconds,
            "peak_memory_gib": peak_memory_gib(device),
        }
        shown = (
            f"loss {metric['loss']:.4f}, margin {metric['rewards/margins']:.3f}, "
            f"accuracy {metric['rewards/accuracies']:.0%}, lr {lr:.2e}, "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
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
        main(parse_args(DPOConfig))
        dist.destroy_process_group()
