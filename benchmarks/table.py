"""README's tables from measurements: `python bench.py table [results/kernels.json]`.

Prints Markdown: attention's TFLOP/s of forward and backward, the loss's time and memory, one column
for each provider, and the figures beside the kernels' aims.
"""

import argparse
import json
from pathlib import Path

# On an H100, bf16, 7B's heads: TFLOP/s of attention in dense rows of 8k, the share of cuDNN's
# forward, the loss's time over that of its three products, and its memory in MiB beside gradients;
# TB/s of decoding NF4.
FORWARD, BACKWARD, CUDNN, PRODUCTS, MEMORY, DECODING = 450, 350, 0.9, 1.15, 600, 2.5


def tables(results):
    """Lines of Markdown: attention for each shape of heads, then the loss."""
    lines, attention = [], results["attention"]
    for shape in dict.fromkeys((r["H"], r["Hk"], r["D"]) for r in attention):
        here = [r for r in attention if (r["H"], r["Hk"], r["D"]) == shape]
        lines += ["", "TFLOP/s, forward / backward, H {}, Hk {}, D {}".format(*shape)]
        lines += grid(here, "row", lambda r: "{forward:.0f} / {backward:.0f}".format(**r["tflops"]))
    lines += ["", "head and loss, forward and backward, ms (MiB beside inputs and gradients)"]
    lines += grid(results["cross_entropy"], "N", time_and_memory)
    lines += ["", "decoding NF4 of (N, K), ms (TB/s read and written)"]
    decoded = [row | {"shape": f"{row['N']} x {row['K']}"} for row in results.get("nf4", [])]
    return lines + grid(decoded, "shape", lambda r: "{ms:.3f} ({tb_per_s:.2f})".format(**r))


def time_and_memory(row):
    """A cell of the loss's table."""
    memory = row.get("peak_mib")
    return f"{row['ms']:.2f}" + (f" ({memory - row['gradients_mib']:,.0f})" if memory else "")


def grid(rows, key, cell):
    """A Markdown table: a line for each value of `key`, a column for each provider."""
    names = list(dict.fromkeys(r["provider"] for r in rows))
    lines = [f"| {key} | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for value in dict.fromkeys(r[key] for r in rows):
        timed = {r["provider"]: r for r in rows if r[key] == value and "ms" in r}
        cells = [cell(timed[name]) if name in timed else "–" for name in names]
        lines.append(f"| {value} | " + " | ".join(cells) + " |")
    return lines


def aims(results):
    """Lines that say of each figure whether it reaches its aim; none for a missing figure."""
    if results["toy"]:
        return []
    rates = {
        (r["row"], r["provider"]): r["tflops"]
        for r in results["attention"]
        if "tflops" in r and (r["H"], r["Hk"], r["D"]) == (32, 32, 128)
    }
    lines = []
    if dense := rates.get(("dense 8192", "ours")):
        for which, aim in (("forward", FORWARD), ("backward", BACKWARD)):
            lines.append(verdict(f"8k {which}, TFLOP/s", dense[which], aim))
        if cudnn := rates.get(("dense 8192", "sdpa cudnn")):
            share = dense["forward"] / cudnn["forward"]
            lines.append(verdict("8k forward, share of cuDNN's", share, CUDNN))
    for row in dict.fromkeys(row for row, _ in rates if row.startswith(("packed", "pairs"))):
        others = [t["both"] for (r, name), t in rates.items() if r == row and name != "ours"]
        if others and (row, "ours") in rates:
            ratio = rates[row, "ours"]["both"] / max(others)
            lines.append(verdict(f"{row}, both ways, over the best of the others", ratio, 1))
    losses = {(r["N"], r["provider"]): r for r in results["cross_entropy"] if "ms" in r}
    for (N, name), row in losses.items():
        products = losses.get((N, "three products"))
        if name == "ours, uniform" and products:
            ratio = row["ms"] / products["ms"]
            lines.append(verdict(f"loss, N {N}, over three products", ratio, PRODUCTS, True))
            if "peak_mib" in row:
                memory = row["peak_mib"] - row["gradients_mib"]
                lines.append(verdict(f"loss, N {N}, MiB", memory, MEMORY, True))
    for row in results.get("nf4", []):
        if row["provider"] == "ours" and "ms" in row:
            what = f"NF4, {row['N']} x {row['K']}, TB/s"
            lines.append(verdict(what, row["tb_per_s"], DECODING))
    return ["", *lines]


def verdict(what, figure, aim, at_most=False):
    """One line: reached or missed."""
    reached = figure <= aim if at_most else figure >= aim
    bound = "at most" if at_most else "at least"
    return f"{'reached' if reached else 'missed '}  {what}: {figure:.4g}, aim {bound} {aim}"


def main(arguments):
    """Print the tables of a file."""
    parser = argparse.ArgumentParser(prog="bench.py table", description=__doc__)
    parser.add_argument("source", nargs="?", default="results/kernels.json")
    results = json.loads(Path(parser.parse_args(arguments).source).read_text(encoding="utf-8"))
    versions = results["versions"]
    print(f"{results['device']}, {results['dtype']}, torch {versions['torch']}, triton "
          f"{versions['triton']}, commit {results['commit']}, {results['date'][:10]}")  # fmt: skip
    print(*tables(results), *aims(results), sep="\n")
