"""What bench.py sft and dpo share: turns of the loops, a plain transformers loop, and figures.

Our loop is not copied here: `run_in_turns` runs the `main` of sft.py or dpo.py itself, and between
its updates the other loops do the same update, one after another, so that what else the machine
does strikes all of them alike. Each of the others is an object with `update(members, lr)`, which
does one update on the records `members` and returns its loss.
"""

import statistics
import time
from collections import namedtuple
from unittest import mock

import numpy as np
import torch

import data
from checkpoint import run_folder
from training.update import make_optimizer, model_flops

# Dicts by the loop's name; CPU seconds are those of all threads.
Update = namedtuple("Update", "members seconds cpu_seconds losses")


# ---- Turns


def run_in_turns(loop, flags, others):
    """Run `loop.main(flags)`, loop being the module sft or dpo; the list of every `Update`.

    others: the other loops by name. After each update of ours all of them take a turn, another one
    first each time. An update of ours lasts from the choice of its records to its record in the
    log: the two functions that main calls there are wrapped.
    """
    updates, begun = [], []

    def update_members(*arguments):
        epoch, members = data.update_members(*arguments)
        begun[:] = members, clocks()
        return epoch, members

    def append_record(path, record):
        members, started = begun
        update = Update(members, {}, {}, {})
        updates.append(update)
        note(update, "ours", started, record["loss"])
        run_folder.append_record(path, record)
        names = list(others)
        turn = record["step"] % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            started = clocks()
            loss = others[name].update(members, record["lr"])
            note(update, name, started, loss)

    with (
        mock.patch.object(loop, "update_members", update_members),
        mock.patch.object(loop, "append_record", append_record),
    ):
        loop.main(flags)
    return updates


def clocks():
    """Seconds, and CPU seconds of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


def note(update, name, started, loss):
    """Put a loop's loss and its times since `started` into an `Update`."""
    update.seconds[name], update.cpu_seconds[name] = (clocks() - started).tolist()
    update.losses[name] = loss


# ---- Plain transformers: padded batches


class PaddedLoop:
    """The usual loop: padded batches of `rows` records, gradients accumulated over the update.

    loss(model, batch, members) is the share of the batch in the loss of the update on `members`.
    config: the `SFTConfig` or `DPOConfig` that our loop runs with.
    """

    def __init__(self, config, rows, loss):
        from transformers import LlamaForCausalLM

        self.clip, self.rows, self.loss = config.clip, rows, loss
        self.model = LlamaForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        self.model.train()
        self.optimizer = make_optimizer(self.model, config)

    def update(self, members, lr):
        """One update on the records `members`: the loss."""
        total = 0.0
        for i in range(0, len(members), self.rows):
            loss = self.loss(self.model, members[i : i + self.rows], members)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def pad(sequences):
    """input_ids, attention_mask and labels (rows, longest) of some `(ids, trained)`."""
    shape = len(sequences), max(len(ids) for ids, _ in sequences)
    input_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, -100)
    for row, (ids, trained) in enumerate(sequences):
        n = len(ids)
        input_ids[row, :n], mask[row, :n] = ids, 1
        labels[row, :n] = np.where(trained, ids, -100)
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padded_flops(config, lengths, rows, lora_rank=0):
    """FLOPs of forward and backward over padded batches, as transformers computes them.

    Like `model_flops`, but of every position of the padded rectangle, with the head at each, and
    with attention over the whole square of a row: with a padding mask none of it is left out.
    """
    flops = 0
    for i in range(0, len(lengths), rows):
        batch = lengths[i : i + rows]
        n = int(max(batch))
        upper = 6 * n * n * config.num_attention_heads * config.head_dim
        whole = model_flops(config, [n], n, lora_rank=lora_rank)
        flops += len(batch) * (whole + config.num_hidden_layers * upper)
    return flops


# ---- Figures


def figures(updates, documents, flops, unit, warm_up=0):
    """Rates over the updates after the first `warm_up`, and medians of the ratios to our times.

    flops(name, lengths, trained, shared): what the loop of that name computes in an update of
    documents of these lengths; shared: tokens that it may compute once for two of them. unit:
    "trained_tokens", or the kind of the documents, whose rate is wanted.
    """
    lengths = [documents.lengths[update.members].ravel() for update in updates]
    shared = [documents.shared[update.members].ravel() for update in updates]
    trained = [int(documents.trained_counts[update.members].sum()) for update in updates]
    amounts = trained if unit == "trained_tokens" else [len(update.members) for update in updates]
    timed, loops = range(min(warm_up, len(updates) - 1), len(updates)), {}
    for name in updates[0].seconds:
        seconds = sum(updates[k].seconds[name] for k in timed)
        work = sum(flops(name, lengths[k], trained[k], shared[k]) for k in timed)
        loops[name] = {
            f"{unit}_per_second": sum(amounts[k] for k in timed) / seconds,
            "updates_per_second": len(timed) / seconds,
            "gflop_per_update": work / len(timed) / 1e9,
            "gflop_per_second": work / seconds / 1e9,
            "time_to_ours": median_ratio([updates[k].seconds for k in timed], name),
            "cpu_time_to_ours": median_ratio([updates[k].cpu_seconds for k in timed], name),
            "seconds": [round(update.seconds[name], 4) for update in updates],
            "cpu_seconds": [round(update.cpu_seconds[name], 4) for update in updates],
            "losses": [update.losses[name] for update in updates],
        }
    theirs = [name for name in loops if name.startswith(("transformers", "TRL"))]
    fastest = min(theirs, key=lambda name: loops[name]["time_to_ours"])
    losses = [(u.losses[name], u.losses["ours"]) for u in updates for name in theirs]
    return {
        "tokens": int(sum(map(sum, lengths))),
        "trained_tokens": sum(trained),
        "updates": len(updates),
        "better": fastest,
        "speed_up": loops[fastest]["time_to_ours"],
        "cpu_speed_up": min(loops[name]["cpu_time_to_ours"] for name in theirs),
        "arithmetic": loops[fastest]["gflop_per_update"] / loops["ours"]["gflop_per_update"],
        "largest_loss_difference": max(abs(a - b) / b for a, b in losses),
        "loops": loops,
    }


def median_ratio(times, name):
    """Median over the updates of a loop's time to ours."""
    return statistics.median(update[name] / update["ours"] for update in times)


def show(figures, unit):
    """Print the table and a summary of it."""
    columns = (f"{unit.split('_')[0]}/s", "GFLOP", "GFLOP/s", "time", "CPU time")
    print(f"{figures['updates']} updates".ljust(42), end="")
    print("".join(f"{column:>10}" for column in columns))
    for name, f in figures["loops"].items():
        print(
            f"{name.replace(', ', ', padded batches of '):42}{f[f'{unit}_per_second']:10,.2f}"
            f"{f['gflop_per_update']:10,.0f}{f['gflop_per_second']:10.1f}"
            f"{f['time_to_ours']:10.2f}{f['cpu_time_to_ours']:10.2f}"
        )
    losses = figures["loops"]["ours"]["losses"]
    print(
        f"{figures['speed_up']:.2f} times as fast as {figures['better']} "
        f"({figures['cpu_speed_up']:.2f} by CPU time), which computes "
        f"{figures['arithmetic']:.2f} times as many FLOPs.\n"
        f"Losses from {losses[0]:.4f} to {losses[-1]:.4f}; relative difference at most "
        f"{figures['largest_loss_difference']:.1e}."
    )


def check_losses(figures, tolerance):
    """Raise `AssertionError` where a loop's losses differ from ours by more than `tolerance`."""
    difference = figures["largest_loss_difference"]
    assert difference < tolerance, f"losses differ by {difference:.1e}, expected < {tolerance:.0e}"
