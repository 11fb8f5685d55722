"""Figures from the JSON files of results/: `plot_kernels`. Needs matplotlib, development only."""

import json
from pathlib import Path


def plot_kernels(json_path, png_path):
    """Attention's TFLOP/s by length and the loss's time and memory by tokens, ours and others'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(Path(json_path).read_text(encoding="utf-8"))
    attention = [r for r in results["attention"] if "ms" in r]
    first = attention[0]
    same = [r for r in attention if all(r[x] == first[x] for x in ("H", "Hk", "D"))]
    figure, axes = plt.subplots(1, 4, figsize=(20, 4.5))
    for axis, which in zip(axes, ("forward", "backward"), strict=False):
        for name in dict.fromkeys(r["provider"] for r in same):
            rows = [r for r in same if r["provider"] == name]
            values = [r["tflops"][which] for r in rows]
            axis.plot([r["row"] for r in rows], values, marker="o", label=name)
        axis.set(title=f"attention {which}", xlabel="documents of the row", ylabel="TFLOP/s")
        axis.tick_params(axis="x", rotation=60)
    losses = results["cross_entropy"]
    for axis, unit, label in ((axes[2], "ms", "time, ms"), (axes[3], "peak_mib", "memory, MiB")):
        for name in dict.fromkeys(r["provider"] for r in losses):
            rows = [r for r in losses if r["provider"] == name and unit in r]
            if rows:
                axis.plot([r["N"] for r in rows], [r[unit] for r in rows], marker="o", label=name)
        axis.set(title="head and loss, both ways", xlabel="tokens", ylabel=label)
        axis.set(xscale="log", yscale="log")
    for axis in axes:
        if axis.has_data():
            axis.legend(fontsize=8)
    shape = f"H {first['H']}, Hk {first['Hk']}, D {first['D']}, {results['dtype']}"
    commit = (results["commit"] or "")[:7]
    figure.suptitle(f"{results['device']} · {shape} · commit {commit} · {results['date'][:10]}")
    figure.tight_layout()
    figure.savefig(png_path, dpi=120)
    plt.close(figure)
