"""What `bench.py gpu` prints: its plan, a line for each part, and the table at the end.

`python bench.py summary DIR` prints the table again, from the gpu.json of that folder.
"""

import argparse
import json
from pathlib import Path

from program.errors import InputError


def plan_lines(parts, begin, end):
    """A line for each part: when it will begin, in how many seconds it should end, what it runs.

    begin, end: seconds since the start of the program.
    """
    lines = ["   begin  about  limit  part"]
    for part in parts:
        fits = begin + part.seconds <= end
        when = f"{begin:6.0f} s" if fits else "  if time"
        command = " ".join(part.command)
        lines.append(f"{when} {part.seconds:4.0f} s {part.limit:4.0f} s  {part.name}: {command}")
        begin += part.seconds * fits
    return lines


def table(results):
    """Lines of Markdown: each part with its status, its seconds and what it found."""
    lines = [
        f"{results['device']}, torch {results['versions'].get('torch')}, commit "
        f"{results['commit']}, {results['date']}",
        "",
        "| part | status | s | found |",
        "| --- | --- | ---: | --- |",
    ]
    for name, found in results["parts"].items():
        text = headline(name, found) if "figures" in found else ""
        lines.append(f"| {name} | {found['status']} | {found.get('seconds', '')} | {text} |")
    left_out = [n for n, found in results["parts"].items() if "figures" not in found]
    return [*lines, "", f"Left out: {', '.join(left_out) or 'nothing'}."]


def headline(name, found):
    """What a part found, in a line; of one without figures its last line, or why it has none.

    A figure that is missing must not end the parts that are still to run.
    """
    if not found.get("figures"):
        lines = found.get("last_lines") or [""]
        ended = "" if found["status"] == "ok" else found["status"]
        return ": ".join(filter(None, (ended, lines[-1][:150].replace("|", "/"))))
    try:
        return HEADLINES[name](found["figures"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return f"figures in another form than summary.py knows ({type(error).__name__}: {error})"


def step(figures):
    """A step's shape, time, rate and memory, and its peer's."""
    mfu, memory = figures["mfu"], figures["peak_memory_gib"]
    text = (
        f"{figures['layers']} layers, {figures['recompute']} recomputed: "
        f"{1e3 * figures['seconds']:,.0f} ms, {figures['tokens_per_second']:,.0f} tokens/s"
    )
    if mfu:
        text += f", MFU {mfu:.1%}"
    if memory:
        text += f", {memory:.1f} GiB"
    peer = figures.get("peer")
    if peer:
        rate = peer.get("tokens_per_second")
        text += f"; transformers {f'{rate:,.0f} tokens/s' if rate else peer['skipped']}"
    return text


def kernels(figures):
    """TFLOP/s of attention, forward / backward, of the first rows; the loss beside its products."""
    rows = [r for r in figures["attention"] if r["provider"] == "ours" and "ms" in r][:6]
    parts = [f"{r['row']} {r['tflops']['forward']:.0f}/{r['tflops']['backward']:.0f}" for r in rows]
    times = {r["provider"]: r["ms"] for r in reversed(figures["cross_entropy"]) if "ms" in r}
    if {"ours, uniform", "three products"} <= times.keys():
        ratio = times["ours, uniform"] / times["three products"]
        parts.append(f"loss {ratio:.2f} times its products")
    return "TFLOP/s: " + ", ".join(parts)


def generate(figures):
    """Tokens a second of each case, ours and the other's."""
    return "tokens/s: " + ", ".join(
        f"{name} " + " / ".join(f"{other} {r:,.0f}" for other, r in f["tokens_per_second"].items())
        for name, f in figures["figures"].items()
    )


def pairs(figures):
    """How much faster a step is with each prompt once."""
    return "prompts once: " + ", ".join(
        f"{name} {f['speed_up']:.2f} times as fast" for name, f in figures["cases"].items()
    )


def tune(figures):
    """Candidates that beat the shipped sizes, which come first, by 3 % or more."""
    groups, better = {}, []
    for row in (row for row in figures["results"] if "ms" in row):
        groups.setdefault((row["kernel"], row["row"]), []).append(row)
    for (kernel, row), timed in groups.items():
        best = min(timed, key=lambda r: r["ms"])
        if kernel.endswith("_kernel") and best["ms"] < 0.97 * timed[0]["ms"]:
            sizes = "/".join(map(str, best["candidate"]))
            better.append(f"{kernel} {row}: {sizes} {best['ms'] / timed[0]['ms']:.2f}")
    return "times of better sizes: " + (", ".join(better) or "none is better")


HEADLINES = {
    "step": step, "step-none": step, "step-all": step, "peer": step, "kernels": kernels,
    "generate": generate, "pairs": pairs, "tune": tune,
}  # fmt: skip


def main(arguments):
    """Print the table of a folder."""
    parser = argparse.ArgumentParser(prog="bench.py summary", description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/gpu")
    path = Path(parser.parse_args(arguments).folder) / "gpu.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected one that `bench.py gpu` wrote")
    print(*table(json.loads(path.read_text())), sep="\n")
