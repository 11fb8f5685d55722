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
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint.resume import resume_run
from checkpoint.run_folder import append_record
from checkpoint.weights import load_hf, save_hf
from data import plan_rows, update_members
from demo import command as demo
from program.errors import RunError, reported
from program.flags import parse_args
from program.progress import progress_bar
from program.ranks import leave, start, sum_over_ranks
from program.signals import watch_signals
from tokens.records import encode_pair
from training import update
from training.flags import LESS_MEMORY, DataFlags, LoRAFlags, OutputFlags, RunFlags
from training.held_out import held_out_logps, log_held_out
from training.parallel import shard
from training.reference import answer_logps, reference_logps
from training.saving import save_or_export, stop_run
from training.setup import finish_run, open_run, start_log


@dataclass(frozen=True)
class DPOConfig(RunFlags, DataFlags, OutputFlags, LoRAFlags):
    """Defaults are Tulu 2+DPO's at every size (EasyLM docs/ai2.md; the paper's appendix B)."""

    model: str | None = None  # Hugging Face folder of the SFT model: start and reference
    data: list[str] | None = None  # preference pairs: .jsonl, .jsonl.gz, .json, .parquet or folders
    out: str = "runs/dpo"  # output folder; an interrupted run there is continued
    epochs: int = 3  # passes over the data
    batch_size: int = 32  # pairs in one update, all ranks together
    max_seq_len: int = 8192  # tokens of prompt and answer together; more are cut on the right
    lr: float = 5e-7  # peak learning rate
    warmup_ratio: float = 0.1  # share of all updates in which the rate rises from 0
    weight_decay: float = 0.0  # of AdamW
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    clip: float = 1.0  # largest global norm of the gradients (0: no clipping)
    beta: float = 0.1  # how strongly the policy is held near the reference (equation 7)
    micro_tokens: int = 16384  # most tokens in one forward pass of one rank
    seed: int = 42  # of the order of the data


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor,
             reference_rejected: Tensor, beta: float) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss and the two implicit rewards of each pair, all (n,), from summed log-probabilities (n,).

    L = -log sigmoid(beta * ((policy_chosen - reference_chosen)
                             - (policy_rejected - reference_rejected)))        (equation 7)
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def pair_metrics(loss: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor,
                 policy_chosen: Tensor, policy_rejected: Tensor) -> dict[str, Tensor]:  # fmt: skip
    """What is logged of each pair, all (n,), under the names that TRL gave them."""
    margins = chosen_rewards - rejected_rewards
    return {
        "loss": loss,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "logps/chosen": policy_chosen,
        "logps/rejected": policy_rejected,
    }


def held_out_means(policy: Tensor, reference: Tensor, beta: float) -> dict[str, float]:
    """What is logged of held-out pairs, from log-probabilities (n, 2): means over the pairs."""
    loss, *rewards = dpo_loss(*policy.T, *reference.T, beta)
    metrics = pair_metrics(loss, *rewards, *policy.T)
    return {name: values.double().mean().item() for name, values in metrics.items()}


def check_first_loss(step: int, loss: float, config: DPOConfig) -> None:
    """Raise `RunError` unless the first update's loss is ln 2: policy and reference are one model.

    Matrix products of another row length round otherwise, and sums of log-probabilities accumulate
    that: at most 1e-2 in fp32, more in bf16. The loss changes by about beta / 2 times that."""
    tolerance = (1e-2 if config.dtype == "float32" else 0.5) * max(config.beta, 0.1)
    if step == 0 and not abs(loss - math.log(2)) < tolerance:
        raise RunError(
            f"the first loss is {loss:.4f}, expected ln 2 = {math.log(2):.4f}: the reference is "
            "another model's; delete its file, *.reference-* beside the data or in --out"
        )


def main(flags: dict) -> None:
    rank, world, device = start()
    run = open_run(DPOConfig(**flags), device, encode_pair, pairs=True)
    config, documents, model = run.config, run.documents, run.model

    shard(model, config, device, run.reshard)
    # Before any forward pass: after one under no_grad, parameters() may hold gathered copies.
    optimizer = update.make_optimizer(model, config)
    # The model that training starts from is the reference, so it is loaded for a resumed run, too.
    load_hf(model, config.model)
    references = reference_logps(model, documents, config, run.facts["weights"], device)  # (n, 2)
    held_out = reference_logps(model, run.held_out, config, run.facts["weights"], device)
    first = resume_run(run.out, model, optimizer, config.keep)
    start_log(run, config, first, device)

    signals, stop = watch_signals(), False  # a signal is noted there, and obeyed after the update
    bar = progress_bar(total=run.last, initial=first, unit="update", disable=rank > 0)
    for step in range(first, run.last + 1):
        # What is due after `step` updates, also just after a resume: held-out loss, saving, export.
        logps = held_out_logps(run, config, step, signals, device)
        if logps is not None:
            log_held_out(run, step, held_out_means(logps, held_out, config.beta), bar)
        stop = save_or_export(run, config, step, first, optimizer, stop, signals)
        if stop or step == run.last:
            break

        # The batch: the update's pairs, the same on all ranks, and this rank's rows of them.
        started = time.perf_counter()
        run.dropout.update = step  # its draws are a function of the update
        epoch, pairs = update_members(len(documents), config.batch_size, config.seed, step)
        tokens, squares = documents.tokens[pairs], documents.squares[pairs]
        hidden_size = model.config.hidden_size
        rows = plan_rows(tokens, world, config.micro_tokens, hidden_size, squares)[rank]

        # Forward, loss, backward: row by row. The loss is the mean over the update's pairs, all
        # rows and ranks; FSDP divides by the ranks.
        sums = torch.zeros(7, dtype=torch.float64, device=device)
        for row in rows:
            policy = answer_logps(model, documents, pairs[row], device)  # (n, 2)
            policy_chosen, policy_rejected = policy.T
            reference_chosen, reference_rejected = references[pairs[row]].to(policy).T
            loss, *rewards = dpo_loss(
                policy_chosen, policy_rejected, reference_chosen, reference_rejected, config.beta
            )
            (loss.sum() * (world / len(pairs))).backward()
            metrics = pair_metrics(loss, *rewards, policy_chosen, policy_rejected)
            sums += torch.stack([values.detach().double().sum() for values in metrics.values()])

        # Clip. One exchange an update: the metrics, and whether any rank was told to stop.
        grad_norm = update.clip_gradients(model, config.clip)
        *means, stop = sum_over_ranks([*(sums / len(pairs)), len(signals)], device)
        metrics = dict(zip(metrics, means, strict=True))
        update.check_finite(step + 1, metrics["loss"], grad_norm, documents, pairs)
        check_first_loss(step, metrics["loss"], config)

        # The rate, and the step.
        lr = update.learning_rate(step, run.total, config.lr, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # Log.
        seconds = time.perf_counter() - started
        record = {"step": step + 1, "epoch": epoch + 1, **metrics, "lr": lr, "grad_norm": grad_norm}
        record |= update.measurements(run, pairs, seconds, device, world)
        record["pairs_per_second"] = len(pairs) / seconds
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
        flags = parse_args(DPOConfig)
        if is_demo := demo.wanted(flags):
            flags = demo.prepare_dpo(flags)
        main(flags)
        if is_demo:
            demo.show_effect(flags)
        leave()
