"""benchmarks/: the FLOPs behind the rates, and a rehearsal of every benchmark at toy size."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from benchmarks import dpo, generate, kernels, load, measure, memory, peers, sft, table, tune
from checkpoint.config import config_from_dict
from pairs import message, pair, write
from program.errors import InputError


def test_attention_flops():
    """For documents of 2 and 3 tokens: half of 4·n²·H·D forward, and 2.5 times that backward."""
    flops = measure.attention_flops([2, 3], H=4, D=16)
    assert flops == {"forward": 2 * 13 * 4 * 16, "backward": 5 * 13 * 4 * 16, "both": 7 * 13 * 64}
    pair = measure.attention_flops([(2, 3, 1)], H=4, D=16)  # documents of 5 and 3, less one of 2
    assert pair["forward"] == 2 * (25 + 9 - 4) * 4 * 16


def test_cross_entropy_flops():
    """Logits, gradient of hidden and gradient of the weight take 2·N·V·E each."""
    assert measure.cross_entropy_flops(3, 5, 7) == 2 * 3 * 5 * 7 * 3


def test_packed_lengths_fill_the_row():
    """The lengths sum to the row, have the given mean and spread, and never change."""
    for mean, total in ((490, 16384), (1097, 16384), (20, 128), (490, 400_000), (490, 7)):
        lengths = measure.packed_lengths(mean, total)
        assert sum(lengths) == total and min(lengths) >= 1
        assert len(lengths) == max(1, round(total / mean))
        assert lengths == measure.packed_lengths(mean, total)
    # The length-weighted mean of a log-normal distribution is mean · exp(sigma²).
    lengths = measure.packed_lengths(490, 400_000)
    assert sum(n * n for n in lengths) / 400_000 == pytest.approx(490 * np.exp(0.81), rel=0.1)


def test_results_without_git(monkeypatch):
    """Without git the commit is None, and the results can still be written."""
    monkeypatch.setenv("PATH", "")
    assert measure.commit() is None


def test_kernels_rehearsal(tmp_path):
    """`bench.py kernels --toy` writes every row, either with figures or with a reason for none."""
    kernels.main(["--toy", "--out", str(tmp_path / "kernels.json")])
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert {"date", "command", "commit", "device", "versions"} <= results.keys()
    assert len(results["attention"]) == 3 * len(kernels.ATTENTION)
    for row in results["attention"] + results["cross_entropy"] + results["nf4"]:
        assert ("ms" in row) != bool(row.get("skipped")), row
    if torch.cuda.is_available():
        return
    timed = [(r["row"], r["provider"]) for r in results["attention"] if "ms" in r]
    twice = ("pairs 9 + 7", "ours, prompts twice")
    assert timed == [(row, "ours") for row in ("dense 32", "packed 20", "pairs 9 + 7")] + [twice]


def test_one_failure_does_not_end_the_comparison(tmp_path, monkeypatch, capsys):
    """The file gives the reason of a failure, and says which rows the time did not allow."""

    def broken(hidden, weight, labels):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(kernels.LOSSES, "eager", broken)
    path = tmp_path / "kernels.json"
    kernels.main(["--toy", "--out", str(path)])
    rows = json.loads(path.read_text())["cross_entropy"]
    failed = [row for row in rows if row["provider"] == "eager"]
    assert {row["skipped"] for row in failed} == {"RuntimeError: no kernel image"}
    assert all("ms" in row for row in rows if row["provider"].startswith("ours"))
    kernels.main(["--toy", "--minutes", "0", "--out", str(path)])
    results = json.loads(path.read_text())
    every = results["attention"] + results["cross_entropy"] + results["nf4"]
    assert every and all(row["skipped"] == "out of time" for row in every)
    capsys.readouterr()
    bench.main(["table", str(path)])
    assert "| 16 | – | – | – | – | – | – |" in capsys.readouterr().out


def test_aims():
    """Each measured figure is compared with its aim; a missing figure gets no verdict."""
    shape = {"H": 32, "Hk": 32, "D": 128}

    def row(name, provider, forward, backward):
        tflops = {"forward": forward, "backward": backward, "both": (forward + backward) / 2}
        return shape | {"row": name, "provider": provider, "tflops": tflops}

    loss = {"E": 4096, "V": 32000, "N": 16384}
    results = {
        "toy": False,
        "attention": [
            row("dense 8192", "ours", 460, 340),
            row("dense 8192", "sdpa cudnn", 500, 480),
            row("packed 490", "ours", 250, 250),
            row("packed 490", "varlen", 200, 200),
            row("packed 490", "flex", 240, 200),
        ],
        "cross_entropy": [
            loss | {"provider": "three products", "ms": 20.0},
            loss
            | {"provider": "ours, uniform", "ms": 22.0, "peak_mib": 1000, "gradients_mib": 378},
        ],
        "nf4": [{"N": 11008, "K": 4096, "provider": "ours", "ms": 0.04, "tb_per_s": 2.8}],
    }
    verdicts = [line.split(":")[0] for line in table.aims(results)[1:]]
    assert verdicts == [
        "reached  8k forward, TFLOP/s",
        "missed   8k backward, TFLOP/s",
        "reached  8k forward, share of cuDNN's",
        "reached  packed 490, both ways, over the best of the others",
        "reached  loss, N 16384, over three products",
        "missed   loss, N 16384, MiB",
        "reached  NF4, 11008 x 4096, TB/s",
    ]
    assert table.aims(results | {"attention": [], "cross_entropy": [], "nf4": []}) == [""]


@pytest.mark.kernel
def test_tune_rehearsal(tmp_path, monkeypatch):
    """`bench.py tune --toy` times the shipped sizes and others, and refuses wrong results."""
    few = {name: [(64, 32, 4, 1)] for name in tune.CANDIDATES}
    monkeypatch.setattr(tune, "CANDIDATES", few)
    monkeypatch.setattr(tune, "SOFTMAX", [(64, 4)])
    monkeypatch.setattr(tune, "WORKSPACES", [1])
    path = tmp_path / "tune.json"
    tune.main(["--toy", "--out", str(path)])
    rows = json.loads(path.read_text())["results"]
    assert len(rows) == 2 * 3 + 1 + 1 and all(row["ms"] > 0 for row in rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = tune.Case([20, 44], 2, 1, 16, device, torch.float16)
    monkeypatch.setattr(case, "launch", lambda name, candidate: None)
    with pytest.raises(AssertionError, match="other than the shipped sizes"):
        case.measure("forward_kernel", (64, 32, 4, 1), device)


SHAPE = config_from_dict(
    {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 5,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
BLOCK = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 5  # weights of q, k, v, o, and of the MLP


def test_flops_of_the_loops():
    """Ours: real tokens and half the square of attention; padded: all positions, all the square."""
    ours = 3 * (6 * BLOCK * 5 + 6 * (2 * 2 + 3 * 3) * 8) + 6 * 11 * 8 * 4
    assert sft.loop_flops(SHAPE, "ours", [2, 3], 4, []) == ours
    assert sft.loop_flops(SHAPE, "its products", [2, 3], 4, []) == ours - 3 * 6 * 13 * 8
    padded = 2 * (3 * (6 * BLOCK * 3 + 12 * 9 * 8) + 6 * 11 * 8 * 3)
    assert sft.loop_flops(SHAPE, "transformers, 4", [2, 3], 4, []) == padded


def test_products_have_the_flops_of_the_loop():
    """The matrix products that stand for our loop have the FLOPs of its weights."""
    lengths = np.array([[5], [9], [10], [4]])  # of which the last three are trained, in two rows
    documents = SimpleNamespace(lengths=lengths, trained_counts=lengths - 1)
    products, done = sft.Products(SHAPE, documents, micro_tokens=16), []
    products.products = lambda rows, n_in, n_out: done.append(6 * rows * n_in * n_out)
    products.update(np.array([1, 2, 3]), 0.0)
    assert sum(done) == sft.loop_flops(SHAPE, "its products", [9, 10, 4], 8 + 9 + 3, [])


@pytest.fixture
def chats(tmp_path):
    """Path of 40 short conversations of various lengths."""
    answers = [message("assistant", "The fox sleeps. " * (k % 7)) for k in range(40)]
    records = [{"messages": [message("user", "What is it?"), answer]} for answer in answers]
    return write(tmp_path / "chats.jsonl", records)


def test_sft_rehearsal(base, chats, tmp_path):
    """`bench.py sft --toy` trains all loops to the same losses and writes what it measured."""
    path = tmp_path / "sft.json"
    flags = ["--toy", "--data", chats, "--tokenizer", base, "--conversations", 36, "--out", path]
    sft.main([*map(str, flags), "--batch-size", "12", "--micro-tokens", "400"])
    results = json.loads(path.read_text())
    assert {"date", "commit", "device", "cores", "versions"} <= results.keys()
    assert results["command"].startswith("python bench.py sft --toy --data chats.jsonl")
    assert str(tmp_path) not in path.read_text()
    assert results["largest_loss_difference"] < sft.FP32_ROUNDING and results["speed_up"] > 0
    for name, loop in results["loops"].items():
        assert len(loop["seconds"]) == 3 and loop["gflop_per_update"] > 0
        # The first update has rate 0, and other conversations than the next.
        assert name == "its products" or loop["losses"][2] < loop["losses"][0]


def test_flops_of_the_dpo_loops():
    """Ours makes the logits twice; padded loops compute a rectangle; TRL makes its logits twice."""
    lengths, head = [2, 3, 3, 3], 2 * 11 * 8
    ours = sft.loop_flops(SHAPE, "ours", lengths, 7, [])
    assert dpo.loop_flops(SHAPE, "ours", lengths, 7, []) == ours + head * 7
    padded = 4 * (3 * (6 * BLOCK * 3 + 12 * 9 * 8) + 3 * head * 3)
    assert dpo.loop_flops(SHAPE, "transformers, 2", lengths, 7, []) == padded
    assert dpo.loop_flops(SHAPE, "TRL, 2", lengths, 7, []) == padded + 4 * head * 3


@pytest.fixture
def sums(tmp_path):
    """Path of 16 preference pairs with short answers."""
    prompts = [[message("user", f"What is {k} plus 2?")] for k in range(16)]
    answers = [(f"The answer is {k + 2}.", "The fox sleeps. " * (k % 3 + 1)) for k in range(16)]
    records = [pair(prompt, *both) for prompt, both in zip(prompts, answers, strict=True)]
    return write(tmp_path / "pairs.jsonl", records)


def test_dpo_rehearsal(base, sums, tmp_path):
    """`bench.py dpo --toy` trains all loops to the same losses and writes what it measured."""
    path = tmp_path / "dpo.json"
    flags = ["--toy", "--data", sums, "--tokenizer", base, "--batch-size", 8, "--out", path]
    dpo.main([*map(str, flags), "--micro-tokens", "300"])
    results = json.loads(path.read_text())
    assert results["speed_up"] > 0 and results["updates"] == 2
    assert results["largest_loss_difference"] < dpo.LOSS_TOLERANCE
    assert {"ours", "transformers, 4", "transformers, 16"} <= results["loops"].keys()
    for loop in results["loops"].values():
        assert loop["losses"][0] == pytest.approx(np.log(2), abs=1e-5)
        assert len(loop["seconds"]) == 2 and loop["gflop_per_update"] > 0


def test_memory_rehearsal(base, sums, tmp_path):
    """`bench.py memory --toy` runs sft.py once and dpo.py twice, on one row of all pairs."""
    path = tmp_path / "memory.json"
    flags = ["--toy", "--data", sums, "--tokenizer", base, "--pairs", 5, "--out", path]
    memory.main([*map(str, flags)])
    results = json.loads(path.read_text())
    assert len(results["peak_gib"]) == 3 and results["pairs"] == 5
    assert all(len(peaks) == 3 and min(peaks) > 0 for peaks in results["peak_gib"].values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory as Linux counts it")
def test_load_rehearsal(base, tmp_path, monkeypatch):
    """`bench.py load --toy` measures our way (transformers takes 20 s to start) and writes it."""
    monkeypatch.setattr(load, "WAYS", ("ours",))
    path = tmp_path / "load.json"
    load.main(
        ["--toy", "--rounds", "1", "--ranks", "1", "--tokenizer", str(base), "--out", str(path)]
    )
    results = json.loads(path.read_text())
    figures = results["figures"]["ours"]
    assert figures["load"]["seconds"] > 0 and figures["save"]["peak_mb"] > 0
    assert results["own_shards_mb"] == pytest.approx(4 * results["model"]["parameters"] / 1e6)


def test_bench_names_the_benchmarks():
    """The error for an unknown benchmark lists the known ones."""
    with pytest.raises(InputError, match="found nope, expected one of dpo, generate, gpu, kernels"):
        bench.main(["nope"])


def test_generate_rehearsal(tmp_path, real_data, monkeypatch):
    """`bench.py generate --toy`: same tokens as transformers', and figures that agree.

    What runs in processes of its own runs in this one; vLLM, which is not installed, in none.
    """
    out = tmp_path / "generate.json"

    def alone(program, job, path, seconds):
        if program == "vllm":
            return {"skipped": "not installed"}
        Path(path).write_text(json.dumps(job | {"seconds": seconds}))
        return peers.main(["--program", program, "--job", path])

    monkeypatch.setattr(generate, "alone", alone)
    figures = generate.main(
        ["--toy", "--alone", "--prompts", "5", "--rounds", "1", "--out", str(out),
         "--data", str(real_data / "eval/gsm8k/test.jsonl"),
         "--tokenizer", str(real_data / "llama2-tokenizer")]
    )  # fmt: skip
    assert json.loads(out.read_text())["figures"] == figures
    assert [f["prompts"] for f in figures.values()] == [1, 5]
    for batch in figures.values():
        assert batch["different_answers"] == 0 and batch["new_tokens"] > 40 * batch["prompts"]
        rates, seconds = batch["tokens_per_second"], batch["seconds"]
        assert rates["ours"] * seconds["ours"][0] == pytest.approx(batch["new_tokens"])
        assert batch["transformers"]["tokens"] == batch["new_tokens"]
        assert batch["bytes"] > 4 * 32000 * 32 * batch["steps"] >= batch["new_tokens"] // 16
    assert json.loads(out.read_text())["first_token"].keys() >= {"loading", "first token"}
