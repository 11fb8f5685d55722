"""bench.py qlora: the FLOPs of its loops, and a rehearsal at toy size."""

import json

import pytest

from benchmarks import qlora
from benchmarks.sft import FP32_ROUNDING
from model import LlamaConfig
from pairs import message, write


def test_flops_of_the_loops_with_adapters():
    """Two products of a frozen weight, three of an adapter's; full training has three of all."""
    shape, rank = LlamaConfig(11, 8, 5, 3, 4, 2, 2, 1e-5, 1e4, False), 3
    projections = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 5), (8, 5), (5, 8)]
    frozen = sum(2 * K * N for K, N in projections)  # FLOPs of a token's product
    adapters = sum(2 * rank * (K + N) for K, N in projections)
    head, square = 2 * 11 * 8, 2 * 8  # and of one of attention's pairs, forward
    ours = 3 * ((2 * frozen + 3 * adapters) * 5 + 3 * square * (2 * 2 + 3 * 3)) + 2 * head * 4
    full = 3 * (3 * frozen * 5 + 3 * square * (2 * 2 + 3 * 3)) + 3 * head * 4
    # Two rows of three positions, their whole square, and the head at each.
    padded = 3 * ((2 * frozen + 3 * adapters) * 6 + 3 * 2 * square * 2 * 9) + 2 * head * 6
    for name, flops in (("ours", ours), ("full training", full), ("transformers + PEFT", padded)):
        assert qlora.loop_flops(shape, rank, name, [2, 3], 4, []) == flops, name


def test_qlora_rehearsal(base, tmp_path, monkeypatch):
    """`bench.py qlora --toy` trains ours and PEFT's to the same losses and writes what it measured.

    Where bitsandbytes is installed, its weights in NF4, too. Full training has other losses.
    """
    pytest.importorskip("peft")
    # Peaks are of processes that import transformers, 20 s each.
    monkeypatch.setattr(qlora, "peak_of", lambda name, flags: 1.0)
    answers = [message("assistant", "The fox sleeps. " * (k % 7)) for k in range(40)]
    chats = [{"messages": [message("user", "What is it?"), answer]} for answer in answers]
    data, path = write(tmp_path / "chats.jsonl", chats), tmp_path / "qlora.json"
    flags = ["--toy", "--data", data, "--tokenizer", base, "--conversations", 36, "--out", path]
    qlora.main([*map(str, flags), "--batch-size", "12", "--micro-tokens", "400"])
    results = json.loads(path.read_text())
    assert results["command"].startswith("python bench.py qlora --toy --data chats.jsonl")
    assert results["largest_loss_difference"] < FP32_ROUNDING and results["speed_up"] > 0
    assert {"ours", "full training", "transformers + PEFT, 4"} <= results["loops"].keys()
    assert results["peak_mib"].keys() == {"nothing"} | results["loops"].keys()
    for loop in results["loops"].values():
        assert len(loop["seconds"]) == 3 and loop["gflop_per_update"] > 0
        # The first update has rate 0, and other conversations than the next.
        assert loop["losses"][2] < loop["losses"][0]
    assert results["loops"]["ours"]["losses"] != results["loops"]["full training"]["losses"]
