"""Pictures of measurements: of a run's metrics.jsonl, or of a JSON file that bench.py wrote.

    python plot.py sft runs/x/metrics.jsonl --out sft.png          loss and learning rate
    python plot.py dpo runs/x/metrics.jsonl --out dpo.png          loss, margin and accuracy
    python plot.py kernels results/gpu/kernels.json --out kernels.png
    python plot.py packing results/packing.json --out packing.png
    python plot.py prune kept.scores.jsonl --out prune.png         scores by source, kept or not

Nothing is drawn that is not in the file. `--note` adds to the title what the file does not say,
such as the commit of a run. results/README.md has the commands of the pictures in results/. Needs
matplotlib (requirements-dev.txt), which brings Pillow.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from PIL import Image

from checkpoint.run_folder import read_records
from program.errors import InputError, reported

# ---- Runs


def plot_sft(metrics_path: str | Path, png_path: str | Path, note: str = "") -> None:
    """Loss of every update, its mean over a hundredth of the run, and the learning rate; and the
    loss on held-out data."""
    start, updates = read_metrics(metrics_path, "loss", "lr")
    steps, losses = [r["step"] for r in updates], [r["loss"] for r in updates]
    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 4.5), height_ratios=(3, 1), layout="constrained"
    )
    curve(upper, steps, losses)
    points(upper, metrics_path, "loss")
    upper.set(ylabel="loss, nats per trained token", title=title(start, "conversations", note))
    upper.grid(alpha=0.3)
    upper.set_ylim(bottom=0)
    lower.plot(steps, [r["lr"] for r in updates], color="C1")
    lower.set(ylabel="learning rate", xlabel="update")
    save(figure, png_path)


def plot_dpo(metrics_path: str | Path, png_path: str | Path, note: str = "") -> None:
    """Loss, margin of the rewards and accuracy of every update, each with its mean, and those of
    held-out pairs."""
    names = ("loss", "rewards/margins", "rewards/accuracies")
    start, updates = read_metrics(metrics_path, *names)
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 6), layout="constrained")
    labels = ("loss, nats per pair", "reward margin, nats", "reward accuracy")
    for axis, name, label in zip(axes, names, labels, strict=True):
        curve(axis, [r["step"] for r in updates], [r[name] for r in updates])
        points(axis, metrics_path, name)
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].axhline(math.log(2), color="C7", linestyle=":")  # policy = reference
    axes[2].set(ylim=(-0.02, 1.02), xlabel="update")
    axes[0].set(title=title(start, "pairs", note))
    save(figure, png_path)


def read_metrics(path: str | Path, *names: str) -> tuple[dict, list[dict]]:
    """The last start and all updates of a metrics.jsonl whose updates have these fields."""
    records = read_records(Path(path))
    starts = [record for record in records if record.get("event") == "start"]
    updates = [record for record in records if "step" in record and "event" not in record]
    if not starts or not updates:
        raise InputError(f"{path}: no start or no update in it, expected a metrics.jsonl")
    if missing := [name for name in names if name not in updates[0]]:
        raise InputError(f"{path}: updates without {missing[0]}, expected those of another program")
    return starts[-1], updates


def curve(axis: Axes, steps: list[int], values: list[float]) -> None:
    """Every update, and in a run of 200 or more the mean over a hundredth of it."""
    window = max(1, len(values) // 100)
    if window > 1:
        means = [sum(values[i - window : i]) / window for i in range(window, len(values) + 1)]
        axis.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8, label="each update")
        axis.plot(steps[window - 1 :], means, color="C0", label=f"mean of the last {window}")
        axis.legend()
    else:
        axis.plot(steps, values, color="C0")


def points(axis: Axes, path: str | Path, name: str) -> None:
    """What was measured on held-out data, where anything was."""
    held_out = [r for r in read_records(Path(path)) if r.get("event") == "eval" and name in r]
    if held_out:
        steps, values = [r["step"] for r in held_out], [r[name] for r in held_out]
        axis.plot(steps, values, color="C3", marker="o", markersize=4, label="held out")
        axis.legend()


def title(start: dict, examples: str, note: str = "") -> str:
    """Model, data, batch and hardware of a run, from its start record, and the note."""
    config, environment = start["config"], start["environment"]
    data = ", ".join(Path(path).name for path in config["data"])
    hardware = f"{environment['ranks']} x {environment['device']}, {config['dtype']}"
    batch = f"{config['batch_size']} {examples} an update"
    return (
        f"{Path(config['model']).name} on {data}, {batch}\n"
        f"{hardware}, torch {environment['torch']}" + (f", {note}" if note else "")
    )


# ---- Files of bench.py


def plot_kernels(json_path: str | Path, png_path: str | Path, note: str = "") -> None:
    """Attention's TFLOP/s by row and the loss's time and memory by tokens, ours and others'."""
    results = json.loads(Path(json_path).read_text(encoding="utf-8"))
    attention = [r for r in results["attention"] if "ms" in r]
    losses = [r for r in results["cross_entropy"] if "ms" in r]
    if not attention or not losses:
        raise InputError(f"{json_path}: no figures of attention or of the loss, expected both")
    first = attention[0]
    same = [r for r in attention if all(r[x] == first[x] for x in ("H", "Hk", "D"))]
    names = sorted({r["row"] for r in same}, key=lambda row: int(row.split()[1]))
    packed = [name for name in names if name.startswith("packed")]
    # "packed 490", …, a gap in every line, "dense 512", "dense 1024", …
    names = [*packed, "", *(name for name in names if name not in packed)]
    figure, axes = plt.subplots(2, 2, figsize=(8, 7.5), layout="constrained")
    for axis, which in zip(axes[0], ("forward", "backward"), strict=True):
        for provider in providers(same):
            rates = {r["row"]: r["tflops"][which] for r in same if r["provider"] == provider}
            line(axis, names, [rates.get(name, math.nan) for name in names], provider)
        axis.set(title=f"attention {which}", xlabel="documents of the row, tokens of each")
        axis.set(ylabel="TFLOP/s")
        axis.set_ylim(bottom=0)
        axis.tick_params(axis="x", rotation=60)
    units = ("ms", "time, ms"), ("peak_mib", "memory, MiB")
    for axis, (unit, label) in zip(axes[1], units, strict=True):
        for provider in providers(losses):
            rows = [r for r in losses if r["provider"] == provider and unit in r]
            if points := sorted((r["N"], r[unit]) for r in rows):
                tokens, values = zip(*points, strict=True)
                line(axis, [f"{n:,}" for n in tokens], values, provider)
        axis.set(title="head and loss, forward and backward", xlabel="tokens", ylabel=label)
        axis.set_yscale("log")
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,g}")
        axis.yaxis.set_minor_formatter("")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.suptitle(facts(results, f"H {first['H']}, Hk {first['Hk']}, D {first['D']}", note))
    save(figure, png_path)


def providers(rows: list[dict]) -> list[str]:
    """The names of who computed, ours first, each once."""
    return sorted(dict.fromkeys(r["provider"] for r in rows), key=lambda p: p[:4] != "ours")


def line(axis: Axes, names: Iterable[str], values: Iterable[float], provider: str) -> None:
    """The figures of one provider, ours the thickest."""
    width = 2.5 if provider.startswith("ours") else 1.2
    axis.plot(names, values, marker="o", markersize=4, linewidth=width, label=provider)


def plot_packing(json_path: str | Path, png_path: str | Path, note: str = "") -> None:
    """The tokens that one update computes, to scale: in packed rows, and in padded batches of 16.

    Each bar is one forward pass, its conversations laid end to end with their padding.
    """
    results = json.loads(Path(json_path).read_text(encoding="utf-8"))
    lengths = results["lengths"]
    everything = range(len(lengths))
    batches = [everything[i : i + 16] for i in everything[::16]]
    packed = [segments(results, row, 0) for row in results["rows"]]
    padded = [segments(results, batch, max(lengths[i] for i in batch)) for batch in batches]
    figure, axes = plt.subplots(
        2, 1, sharex=True, figsize=(8, 4.5), layout="constrained",
        height_ratios=(len(packed) + 1, len(padded) + 1),
    )  # fmt: skip
    colours = {"prompt": "#9ecae1", "trained": "#08519c", "padding": "#fdae6b"}
    layouts = ("packed rows", packed), ("padded, 16 conversations a batch", padded)
    for axis, (name, passes) in zip(axes, layouts, strict=True):
        for y, spans in enumerate(passes, 1):
            for kind, colour in colours.items():
                axis.broken_barh(spans[kind], (y - 0.4, 0.8), facecolor=colour)
        tokens = sum(width for spans in passes for kind in spans for _, width in spans[kind])
        axis.set_title(
            f"{name}: {len(passes)} forward pass{'es' * (len(passes) > 1)}, {tokens:,} tokens, "
            f"{sum(lengths) / tokens:.0%} of them useful", fontsize=10, loc="left",
        )  # fmt: skip
        axis.set(ylabel="forward pass", yticks=range(1, len(passes) + 1))
        axis.invert_yaxis()
    axes[1].xaxis.set_major_formatter("{x:,.0f}")
    axes[1].set(xlabel="tokens that the pass computes", xlim=(0, results["row_tokens"]))
    axes[1].legend([Patch(color=c) for c in colours.values()], colours, loc="lower right")
    figure.suptitle(facts(results, f"{len(lengths)} conversations of {results['data']}", note))
    save(figure, png_path)


def segments(results: dict, members: Iterable[int], width: int) -> dict[str, list[tuple[int, int]]]:
    """(first token, tokens) of prompts, trained tokens and padding in one forward pass.

    Conversations `members` lie end to end, each padded to `width` tokens.
    """
    spans = {"prompt": [], "trained": [], "padding": []}
    x = 0
    for i in members:
        ends = [0, *(end for span in results["trained"][i] for end in span), results["lengths"][i]]
        # Runs alternate: up to the first end is prompt, up to the second trained, and so on.
        for k, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
            spans["trained" if k % 2 else "prompt"].append((x + begin, end - begin))
        spans["padding"].append((x + ends[-1], max(0, width - ends[-1])))
        x += max(width, ends[-1])
    return spans


def plot_prune(scores_path: str | Path, png_path: str | Path, note: str = "") -> None:
    """For each source of a FILE.scores.jsonl, how many conversations have which score."""
    sources = {}
    try:
        with open(scores_path, encoding="utf-8") as file:
            for line in map(json.loads, file):
                scores = sources.setdefault(line["dataset"], ([], []))
                scores[line["kept"]].append(line["score"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{scores_path}: {error!r}, expected prune.py's scores") from None
    if not sources:
        raise InputError(f"{scores_path}: no scores in it, expected prune.py's")
    figure, axes = plt.subplots(
        len(sources), 1, sharex=True, squeeze=False, layout="constrained",
        figsize=(8, 1.2 + 1.5 * len(sources)),
    )  # fmt: skip
    everything = [score for both in sources.values() for scores in both for score in scores]
    low, high = min(everything), max(everything)
    edges = [low + (high - low or 1) * k / 50 for k in range(51)]
    for axis, (name, (left, kept)) in zip(axes[:, 0], sources.items(), strict=True):
        axis.hist([kept, left], edges, stacked=True, color=["#08519c", "#9ecae1"])
        total = len(kept) + len(left)
        axis.set_title(f"{name}: {len(kept):,} of {total:,} kept", fontsize=10, loc="left")
        axis.set(ylabel="conversations")
    axes[-1, 0].set(xlabel="score")
    axes[0, 0].legend([Patch(color="#08519c"), Patch(color="#9ecae1")], ["kept", "not kept"])
    figure.suptitle(" · ".join(part for part in (Path(scores_path).name, note) if part))
    save(figure, png_path)


def facts(results: dict, subject: str, note: str) -> str:
    """What was measured, on what, by which commit, and when."""
    timed = "dtype" in results  # else it was counted, and the device does not matter
    where = f"{results['device']}, {results['dtype'].removeprefix('torch.')}" if timed else ""
    commit = (results["commit"] or "unknown")[:7]
    parts = subject, where, f"commit {commit}", results["date"][:10], note
    return " · ".join(part for part in parts if part)


def save(figure: Figure, png_path: str | Path) -> None:
    """Write the picture: on white, so that it can be read on a dark page, and in 64 colours."""
    figure.savefig(png_path, dpi=160, facecolor="white")
    with Image.open(png_path) as image:
        image.convert("RGB").quantize(64).save(png_path, optimize=True)
    plt.close(figure)


PLOTS = {
    "sft": plot_sft, "dpo": plot_dpo, "kernels": plot_kernels, "packing": plot_packing,
    "prune": plot_prune,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=PLOTS)
    parser.add_argument("source", help="the file of measurements")
    parser.add_argument("--out", required=True, help="the PNG to write")
    parser.add_argument("--note", default="", help="put into the title: a commit, for example")
    options = parser.parse_args()
    plt.switch_backend("Agg")  # needs no screen
    PLOTS[options.what](options.source, options.out, options.note)


if __name__ == "__main__":
    with reported():
        main()
