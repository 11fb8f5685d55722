"""What plan.py says of one stage of training: a record of figures, and the same as text."""

import dataclasses

from model import LlamaConfig
from planning import fit, memory, speed, updates
from planning.gpus import GPU
from planning.memory import Layout
from planning.speed import Row
from planning.updates import Lengths, Updates
from program.errors import amount

BAR = 60  # characters of the bar that stands for a GPU's memory
LETTERS = {
    "weights": "W",
    "gradients": "G",
    "moments": "M",
    "gathered": "g",
    "activations": "a",
    "loss": "l",
    "other": "o",
}
MEANING = {
    "weights": "fp32 weights (and frozen ones), this GPU's share",
    "gradients": "fp32 gradients, its share",
    "moments": "AdamW's two moments, its share",
    "gathered": "weights that blocks compute with, whole",
    "activations": "what blocks keep for backward, and the block at work",
    "loss": "head and loss",
    "other": "sums over ranks; allowance for the allocator and NCCL",
}


def figures(
    stage: str, config: LlamaConfig, layout: Layout, gpu: GPU, lengths: Lengths, schedule: dict,
    recompute: int | None = None,
) -> dict:  # fmt: skip
    """The record of one stage ("sft" or "dpo"), by the keys of plan.json.

    config: of the model; layout: flags that the user has set; lengths: `Lengths`; schedule: a dict
    batch_size, epochs, micro_tokens, max_steps, seed. recompute: blocks, None for what the loops
    choose.
    """
    micro, ranks = schedule["micro_tokens"], layout.ranks
    planned = updates.sample_updates(
        lengths, schedule["batch_size"], schedule["epochs"], micro, ranks, config, schedule["seed"]
    )
    row_tokens, rows, predicted = updates.extent(planned, micro)
    layout = dataclasses.replace(layout, row_tokens=row_tokens, rows=rows, predicted=predicted)
    layout = fit.chosen(config, layout, gpu.gib, recompute)
    gib = memory.memory(config, layout)
    record = {
        "stage": stage,
        "data": lengths.name,
        "gpu": gpu.name,
        "gpus": ranks,
        "fits": gib["total"] <= gpu.gib,
        "gib": gib,
        "gib_available": gpu.gib,
        "moment": memory.peak(config, layout)[0],
        "recompute": layout.recompute,
        "blocks": config.num_hidden_layers,
        "keeps_gathered": layout.keeps_gathered,
        "row_tokens": row_tokens,
        "rows": rows,
        "tokens_per_update": planned.tokens,
    }
    if not record["fits"]:
        longest = int(lengths.in_rows.max())
        found = fit.changes(config, layout, gpu.gib, longest)
        return record | dict.fromkeys(TIMES) | {"would_fit": [text for text, _ in found]}
    return record | times(stage, config, layout, gpu, lengths, planned, schedule)


TIMES = (
    "seconds_per_update", "seconds_by_part", "tokens_per_second_per_gpu", "mfu", "imbalance",
    "updates", "hours", "gpu_hours",
)  # fmt: skip


def times(
    stage: str, config: LlamaConfig, layout: Layout, gpu: GPU, lengths: Lengths, planned: Updates,
    schedule: dict,
) -> dict:  # fmt: skip
    """The figures of time: means of the updates that were planned."""
    parts, flops, slowest = {}, 0, 0
    for rows in planned.rows:
        for name, seconds in speed.update_seconds(config, layout, gpu, rows).items():
            parts[name] = parts.get(name, 0) + seconds / len(planned.rows)
        ranks = [sum(row.tokens for row in rank) for rank in rows]
        slowest += max(ranks) / (sum(ranks) / len(ranks)) / len(planned.rows)
        each = [model_flops(config, row, layout.lora_rank) for rank in rows for row in rank]
        flops += sum(each) / len(planned.rows)
    seconds = sum(parts.values())
    count = min(planned.total, schedule["max_steps"] or planned.total)
    hours = count * seconds / 3600
    if stage == "dpo":  # the reference's log-probabilities: once over all pairs
        passes = [speed.forward_seconds(config, layout, gpu, rows) for rows in planned.rows]
        hours += len(lengths.tokens) / schedule["batch_size"] * sum(passes) / len(passes) / 3600
    return {
        "seconds_per_update": seconds,
        "seconds_by_part": parts,
        "tokens_per_second_per_gpu": planned.tokens / seconds / layout.ranks,
        "mfu": flops / seconds / gpu.flops / layout.ranks,
        "imbalance": slowest,
        "updates": count,
        "hours": hours,
        "gpu_hours": hours * layout.ranks,
    }


def model_flops(config: LlamaConfig, row: Row, lora_rank: int = 0) -> float:
    """As `model_flops` of training/update.py, of a row."""
    attention = 6 * row.squares * config.num_attention_heads * config.head_dim
    products = speed.matrix_flops(config, memory.Layout(lora_rank=lora_rank), row)
    return sum(products) + config.num_hidden_layers * attention


def bar(gib: dict[str, float], available: float) -> str:
    """One line: each item's letter for its share of the GPU's memory, dots for what is free."""
    scale = BAR / max(available, gib["total"])
    text, filled = "", 0.0
    for name, letter in LETTERS.items():
        filled += gib[name]
        text += letter * (round(filled * scale) - len(text))
    room = round(available * scale)
    return f"[{text[:room]:.<{room}}]{text[room:]}"


def table(record: dict, price: float | None = None) -> list[str]:
    """The record as lines for a person."""
    gib, available = record["gib"], record["gib_available"]
    gpus = f"{record['gpus']} x {record['gpu']}"
    lines = [f"{record['stage'].upper()} on {gpus}: {record['data']}", ""]
    lines += [f"  memory of one GPU at its peak ({record['moment']}), GiB"]
    for name, letter in LETTERS.items():
        lines.append(f"  {letter}  {name:<12}{gib[name]:>8.1f}   {MEANING[name]}")
    verdict = "fits" if record["fits"] else "does NOT fit"
    lines.append(f"     {'total':<12}{gib['total']:>8.1f}   of {available:.1f}: {verdict}")
    lines += [f"  {bar(gib, available)}", ""]
    blocks, again = record["blocks"], record["recompute"]
    what = {0: "no block", blocks: f"all {amount(blocks, 'blocks')}"}.get(
        again, f"the last {again} of {amount(blocks, 'blocks')}"
    )
    lines.append(f"  recomputed in backward: {what} (--recompute {again})")
    passes = "up to " * (record["rows"] > 1) + amount(record["rows"], "rows")
    lines.append(
        f"  an update: {record['tokens_per_update']:,.0f} tokens, on each GPU {passes} of up to "
        f"{record['row_tokens']:,}"
    )
    if not record["fits"]:
        found = record["would_fit"]
        lines += ["", "  what would fit, each by itself, the least change first:"]
        lines += [f"    {text}" for text in found] or ["    nothing that was tried"]
        return lines
    return lines + ["", *time_lines(record, price)]


def time_lines(record: dict, price: float | None) -> list[str]:
    """The lines of time and cost."""
    lines, seconds = [], record["seconds_per_update"]
    for name, part in record["seconds_by_part"].items():
        if part >= 0.005 * seconds:
            lines.append(f"  {name:<26}{part:>8.2f} s {'#' * round(30 * part / seconds)}")
    lines.append(f"  {'an update':<26}{seconds:>8.2f} s")
    share = record["tokens_per_update"] / record["gpus"]
    exposed = record["seconds_by_part"]["exchange, not hidden"]
    if record["gpus"] > 1:
        lines.append(
            f"  each GPU gets {share:,.0f} tokens an update, the busiest {record['imbalance']:.1f} "
            f"times as many; {exposed / seconds:.0%} of the time is exchange that does not hide"
        )
    lines.append(
        f"  {record['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, MFU {record['mfu']:.1%}"
    )
    total = (
        f"  {amount(record['updates'], 'updates')}: {record['hours']:,.1f} hours, "
        f"{record['gpu_hours']:,.0f} GPU hours"
    )
    if price is not None:
        total += f", {price * record['gpu_hours']:,.0f} at {price:g} a GPU hour"
    return [*lines, total + " (not counted: loading, compiling, held-out losses, saving)"]
