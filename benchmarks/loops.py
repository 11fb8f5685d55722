"""What the comparisons of training loops share: model, data, padded batches, turns and figures.

A loop is anything with `update(...)`, which does one update and returns the loss; the files sft.py
and dpo.py beside this one hold theirs. All loops take the same updates in turn, so that what else
the machine does strikes them alike.
"""

import os
import shutil
import statistics
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from data import Documents
from program.errors import InputError
from training.update import model_flops

# The shapes of the model; the tiny one is for tests.
REAL = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 688, "vocab_size": 32000}
TOY = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 88, "vocab_size": 400}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

# The last three by name of the loop; CPU seconds are those of all threads.
Update = namedtuple("Update", "members seconds cpu_seconds losses")


def make_model(config, folder):
    """A Hugging Face folder of random weights, from which every loop starts."""
    import transformers

    torch.manual_seed(config.seed)
    shape = transformers.LlamaConfig(**(TOY if config.toy else REAL), **HEADS)
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)


def first_documents(config, default, records, folder, max_seq_len, encode_record, per_record=1):
    """The first records of config.data (or $TULU_DATA's `default`) by data.py, cached in `folder`.

    The tokenizer goes into that folder, too.
    """
    shared = Path(os.environ.get("TULU_DATA", "../shared/data"))
    data = Path(config.data or shared / default)
    tokenizer = Path(config.tokenizer or shared / "llama2-tokenizer") / "tokenizer.model"
    for path, flag in ((data, "--data"), (tokenizer, "--tokenizer")):
        if not path.is_file():
            raise InputError(f"{flag}: {path}: no such file")
    shutil.copy(tokenizer, folder)
    first = Path(folder) / "data.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    first.write_text("".join(lines[:records]), encoding="utf-8")
    return Documents([first], folder, max_seq_len, encode_record, per_record=per_record)


# ---- Plain transformers: padded batches


def pad(documents):
    """input_ids, attention_mask and labels (rows, longest) of some documents."""
    shape = len(documents), max(len(ids) for ids, _ in documents)
    input_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, -100)
    for row, (ids, trained) in enumerate(documents):
        n = len(ids)
        input_ids[row, :n], mask[row, :n] = ids, 1
        labels[row, :n] = np.where(trained, ids, -100)
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padded_flops(shape, lengths, rows):
    """FLOPs of forward and backward over padded batches, as transformers does them.

    As `model_flops`, but of every position of the padded rectangle, the head at all of them, and
    attention over the whole square of a row: with a padding mask none of it is left out.
    """
    flops = 0
    for i in range(0, len(lengths), rows):
        batch = lengths[i : i + rows]
        n = int(max(batch))
        upper = 6 * n * n * shape.num_attention_heads * shape.head_dim
        flops += len(batch) * (model_flops(shape, [n], n) + shape.num_hidden_layers * upper)
    return flops


# ---- Turns


def clocks():
    """Seconds, and CPU seconds of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


def take_turns(loops, turn, members, *arguments):
    """One `Update`: each loop's `update(*arguments)`, another one beginning in each turn."""
    update, names = Update(members, {}, {}, {}), list(loops)
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        started = clocks()
        update.losses[name] = loops[name].update(*arguments)
        update.seconds[name], update.cpu_seconds[name] = (clocks() - started).tolist()
    return update


# ---- Figures


def figures(updates, flops, unit, amount, warm_up=0):
    """Rates over the updates after `warm_up` of them, and ratios to ours: medians of each update's.

    flops(name, members) and amount(members), of the unit whose rate is wanted, are of one update.
    """
    timed, loops = updates[warm_up:] or updates, {}
    for name in updates[0].seconds:
        seconds = sum(update.seconds[name] for update in timed)
        work = sum(flops(name, update.members) for update in timed)
        loops[name] = {
            f"{unit}_per_second": sum(amount(update.members) for update in timed) / seconds,
            "updates_per_second": len(timed) / seconds,
            "gflop_per_update": work / len(timed) / 1e9,
            "gflop_per_second": work / seconds / 1e9,
            "time_to_ours": median_ratio([update.seconds for update in timed], name),
            "cpu_time_to_ours": median_ratio([update.cpu_seconds for update in timed], name),
            "seconds": [round(update.seconds[name], 4) for update in updates],
            "cpu_seconds": [round(update.cpu_seconds[name], 4) for update in updates],
            "losses": [update.losses[name] for update in updates],
        }
    theirs = [name for name in loops if name.startswith(("transformers", "TRL"))]
    better = min(theirs, key=lambda name: loops[name]["time_to_ours"])
    losses = [(u.losses[name], u.losses["ours"]) for u in updates for name in theirs]
    return {
        "updates": len(updates),
        "better": better,
        "speed_up": loops[better]["time_to_ours"],
        "cpu_speed_up": min(loops[name]["cpu_time_to_ours"] for name in theirs),
        "arithmetic": loops[better]["gflop_per_update"] / loops["ours"]["gflop_per_update"],
        "largest_loss_difference": max(abs(a - b) / b for a, b in losses),
        "loops": loops,
    }


def median_ratio(times, name):
    """Median over the updates of a loop's time to ours."""
    return statistics.median(update[name] / update["ours"] for update in times)


def show(figures, unit):
    """Print the table and what explains it."""
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
        f"{figures['speed_up']:.2f} times {figures['better']} ({figures['cpu_speed_up']:.2f} by "
        f"CPU time), which does {figures['arithmetic']:.2f} times our arithmetic.\n"
        f"Losses from {losses[0]:.4f} to {losses[-1]:.4f}, at most "
        f"{figures['largest_loss_difference']:.1e} of them apart."
    )
