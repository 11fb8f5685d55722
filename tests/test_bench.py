"""benchmarks/: the FLOPs behind the rates, and a rehearsal at toy size."""

import json

import torch

from benchmarks import kernels, measure, step


def test_attention_flops():
    """Documents of 2 and 3 tokens: 4·n²·H·D, half of it masked; backward is 2.5 times that."""
    flops = measure.attention_flops([2, 3], H=4, D=16)
    assert flops == {"forward": 2 * 13 * 4 * 16, "backward": 5 * 13 * 4 * 16, "both": 7 * 13 * 64}


def test_cross_entropy_flops():
    """Logits, hidden's and the weight's gradient: each 2·N·V·E."""
    assert measure.cross_entropy_flops(3, 5, 7) == 2 * 3 * 5 * 7 * 3


def test_packed_lengths_fill_the_row():
    """To the token, with a mean near the one asked for, the same every time."""
    lengths = measure.packed_lengths(490, 400_000)
    assert sum(lengths) == 400_000 and max(lengths) <= 8192 and min(lengths) >= 1
    assert 0.9 * 490 < 400_000 / len(lengths) < 1.1 * 490
    assert lengths == measure.packed_lengths(490, 400_000)


def test_kernels_rehearsal(tmp_path):
    """`bench.py kernels --toy` writes every row, measured or skipped with its reason."""
    kernels.main(["--toy", "--out", str(tmp_path / "kernels.json")])
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert {"date", "command", "commit", "device", "versions"} <= results.keys()
    assert len(results["attention"]) == 2 * len(kernels.ATTENTION)
    for row in results["attention"] + results["cross_entropy"]:
        assert ("ms" in row) != bool(row.get("skipped")), row
    if torch.cuda.is_available():
        return
    others = [r for r in results["attention"] if r["provider"] != "ours"]
    assert all(r["skipped"] == "needs a GPU" for r in others)


def test_layers_that_fit():
    """About 3.7 GB a block, at 18 bytes a weight: 80 GiB hold some of the 32, a TiB all."""
    assert 10 <= step.layers_that_fit(80 << 30, step.LLAMA_2_7B, 16384) <= 18
    assert step.layers_that_fit(1 << 40, step.LLAMA_2_7B, 16384) == 32


def test_step_rehearsal(tmp_path):
    """`bench.py step --toy` trains a tiny model: its loss falls, and all is written."""
    step.main(["--toy", "--out", str(tmp_path / "step.json")])
    results = json.loads((tmp_path / "step.json").read_text())
    assert results["losses"][-1] < results["losses"][0]
    assert results["tokens"] == 256 and results["tokens_per_second"] > 0
