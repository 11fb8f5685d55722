"""Figures from measurements: metrics.jsonl of a run, or the JSON files that bench.py writes.

    python plot.py sft runs/x/metrics.jsonl --out sft.png
    python plot.py dpo runs/x/metrics.jsonl --out dpo.png
    python plot.py kernels results/kernels.json --out kernels.png

Needs matplotlib (requirements-dev.txt). Nothing is drawn that is not in the file.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from checkpoint.run_folder import read_records
from program.errors import InputError, reported


def plot_sft(metrics_path, png_path):
    """Loss of every update, its mean over a hundredth of the run, and the learning rate."""
    start, updates = read_metrics(metrics_path, "loss", "lr")
    steps, losses = [r["step"] for r in updates], [r["loss"] for r in updates]
    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    curve(upper, steps, losses)
    upper.set(ylabel="loss, nats per trained token", title=title(start, "conversations"))
    upper.grid(alpha=0.3)
    lower.plot(steps, [r["lr"] for r in updates], color="C1")
    lower.set(ylabel="learning rate", xlabel="update")
    figure.savefig(png_path, dpi=120)
    plt.close(figure)


def plot_dpo(metrics_path, png_path):
    """Loss, margin of the rewards and accuracy of every update, each with its mean."""
    names = ("loss", "rewards/margins", "rewards/accuracies")
    start, updates = read_metrics(metrics_path, *names)
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 8), layout="constrained")
    labels = ("loss, nats per pair", "margin of the rewards, nats", "pairs ranked as preferred")
    for axis, name, label in zip(axes, names, labels, strict=True):
        curve(axis, [r["step"] for r in updates], [r[name] for r in updates])
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].axhline(math.log(2), color="C7", linestyle=":")  # policy = reference
    axes[2].set(ylim=(-0.02, 1.02), xlabel="update")
    axes[0].set(title=title(start, "pairs"))
    figure.savefig(png_path, dpi=120)
    plt.close(figure)


def read_metrics(path, *names):
    """The last start and all updates of a metrics.jsonl whose updates have these fields."""
    records = read_records(Path(path))
    starts = [record for record in records if record.get("event") == "start"]
    updates = [record for record in records if "step" in record]
    if not starts or not updates:
        raise InputError(f"{path}: no start or no update in it, expected a metrics.jsonl")
    if missing := [name for name in names if name not in updates[0]]:
        raise InputError(f"{path}: updates without {missing[0]}, expected those of another program")
    return starts[-1], updates


def curve(axis, steps, values):
    """Every update, and in a run of 200 or more the mean over a hundredth of it."""
    window = max(1, len(values) // 100)
    if window > 1:
        means = [sum(values[i - window : i]) / window for i in range(window, len(values) + 1)]
        axis.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8, label="each update")
        axis.plot(steps[window - 1 :], means, color="C0", label=f"mean of the last {window}")
        axis.legend()
    else:
        axis.plot(steps, values, color="C0")


def title(start, examples):
    """Model, data, batch and hardware of a run, from its start record."""
    config, environment = start["config"], start["environment"]
    data = ", ".join(Path(path).name for path in config["data"])
    hardware = f"{environment['ranks']} x {environment['device']}, {config['dtype']}"
    batch = f"{config['batch_size']} {examples} an update"
    return (
        f"{Path(config['model']).name} on {data}, {batch}\n{hardware}, torch {environment['torch']}"
    )


def plot_kernels(json_path, png_path):
    """Attention's TFLOP/s by row and the loss's time and memory by tokens, ours and others'."""
    results = json.loads(Path(json_path).read_text(encoding="utf-8"))
    attention = [r for r in results["attention"] if "ms" in r]
    losses = [r for r in results["cross_entropy"] if "ms" in r]
    if not attention or not losses:
        raise InputError(f"{json_path}: no figures of attention or of the loss, expected both")
    first = attention[0]
    same = [r for r in attention if all(r[x] == first[x] for x in ("H", "Hk", "D"))]
    # "dense 512", "dense 1024", …, then "packed 490", …
    names = sorted({r["row"] for r in same}, key=lambda row: (row.split()[0], int(row.split()[1])))
    figure, axes = plt.subplots(1, 4, figsize=(20, 5), layout="constrained")
    for axis, which in zip(axes, ("forward", "backward"), strict=False):
        for provider in dict.fromkeys(r["provider"] for r in same):
            found = {r["row"]: r["tflops"][which] for r in same if r["provider"] == provider}
            values = [found.get(name, math.nan) for name in names]
            axis.plot(names, values, marker="o", label=provider)
        axis.set(title=f"attention {which}", xlabel="documents of the row", ylabel="TFLOP/s")
        axis.set_ylim(bottom=0)
        axis.tick_params(axis="x", rotation=60)
    for axis, unit, label in ((axes[2], "ms", "time, ms"), (axes[3], "peak_mib", "memory, MiB")):
        for provider in dict.fromkeys(r["provider"] for r in losses):
            rows = [r for r in losses if r["provider"] == provider and unit in r]
            if points := sorted((r["N"], r[unit]) for r in rows):
                tokens, values = zip(*points, strict=True)
                axis.plot([f"{n:,}" for n in tokens], values, marker="o", label=provider)
        axis.set(title="head and loss, both ways", xlabel="tokens", ylabel=label, yscale="log")
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,g}")
        axis.yaxis.set_minor_formatter("")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    shape = f"H {first['H']}, Hk {first['Hk']}, D {first['D']}, {results['dtype']}"
    commit = (results["commit"] or "")[:7]
    figure.suptitle(f"{results['device']} · {shape} · commit {commit} · {results['date'][:10]}")
    figure.savefig(png_path, dpi=120)
    plt.close(figure)


PLOTS = {"sft": plot_sft, "dpo": plot_dpo, "kernels": plot_kernels}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=PLOTS)
    parser.add_argument("source", help="the file of measurements")
    parser.add_argument("--out", required=True, help="the PNG to write")
    options = parser.parse_args()
    plt.switch_backend("Agg")  # needs no screen
    PLOTS[options.what](options.source, options.out)


if __name__ == "__main__":
    with reported():
        main()
