"""sft.py as its users start it, against a plain transformers + torch loop."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, run_program, updates
from data import update_members
from harm import harmed, recipe
from training.flags import LESS_MEMORY
from training.update import learning_rate


def encode_by_prefix(tokenizer, messages):
    """Ids and loss mask of a conversation as EasyLM found them: by tokenising prefixes."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    mask = np.zeros(len(ids), bool)
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                messages[:k], add_generation_prompt=True, return_dict=False
            )
            after = tokenizer.apply_chat_template(messages[: k + 1], return_dict=False)
            mask[len(before) : len(after)] = True
    return torch.tensor(ids), torch.tensor(mask)


def test_three_updates_on_two_ranks_equal_a_plain_transformers_loop(base, conversations, tmp_path):
    """Every figure in the log and the final weights, with warm-up, decay and a clip that bites.

    The clip makes gradients as small as AdamW's eps: so eps counts, and an update is as smooth as
    its gradient (where eps does not count, rounding noise moves a weight by part of the rate). Of
    the rates, 0, 0.03 and 0.07, the decay takes a tenth of every weight.
    """
    flags = ["--model", base, "--data", conversations, "--out", tmp_path, "--batch-size", 7]
    flags += ["--epochs", 4, "--max-steps", 3, "--lr", 0.1, "--warmup-ratio", 0.2, "--clip", 1e-6]
    run_program("sft.py", *flags, "--weight-decay", 1, "--micro-tokens", 1500, ranks=2)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    records = [json.loads(line) for line in Path(conversations).read_text().splitlines()]
    examples = [encode_by_prefix(tokenizer, record["messages"]) for record in records]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=1)
    total = 4 * (len(examples) // 7)
    for step, record in enumerate(updates(tmp_path)):
        epoch, members = update_members(len(examples), 7, seed=42, step=step)
        trained = sum(int(examples[i][1].sum()) for i in members)
        loss = 0
        for i in members:
            ids, mask = examples[i]
            logits = model(ids[None]).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            loss = loss + nll[mask[1:]].sum() / trained
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, 0.1, 0.2)
        optimizer.step()
        optimizer.zero_grad()
        assert (record["step"], record["epoch"]) == (step + 1, epoch + 1)
        assert record["lr"] == learning_rate(step, total, 0.1, 0.2)
        assert record["tokens"] == sum(len(examples[i][0]) for i in members)
        assert record["trained_tokens"] == trained
        # fp32 sums of some thousand terms in another order.
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert len(updates(tmp_path)) == 3
    saved = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        # Rounding to bf16, which keeps 8 bits, and fp32's own: some 1e-8.
        torch.testing.assert_close(saved[name].float(), parameter.data, rtol=2**-8, atol=1e-6)


def test_rows_and_ranks_change_nothing_but_rounding(base, conversations, tmp_path):
    """One row or many, one rank or four (some of them idle): the same losses and norms."""
    flags = {"model": str(base), "data": [str(conversations)], "batch_size": 6, "max_steps": 3}
    for name, micro_tokens, ranks in (("one", 16384, 1), ("many", 1400, 1), ("ranks", 1500, 4)):
        out = {"out": str(tmp_path / name), "micro_tokens": micro_tokens}
        assert harmed(flags | {"lr": 1e-3} | out, ranks=ranks) == 0
    one = updates(tmp_path / "one")
    for other in (updates(tmp_path / "many"), updates(tmp_path / "ranks")):
        for a, b in zip(one, other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            for name in ("trained_tokens", "tokens", "lr", "epoch"):
                assert a[name] == b[name]


def test_bf16_trains_as_fp32_does_on_one_rank_and_on_two(base, conversations, tmp_path):
    """Losses and gradient norms of four updates; small steps of the fp32 weights are not lost."""

    def records(name, ranks=1, **flags):
        flags = recipe(base, conversations, tmp_path / name) | {"lr": 1e-4, "max_steps": 4} | flags
        assert harmed(flags | {"warmup_ratio": 0, "micro_tokens": 1000}, ranks=ranks) == 0
        return updates(tmp_path / name)

    fp32, one = records("fp32"), records("one", dtype="bfloat16")
    two = records("two", 2, dtype="bfloat16")
    outs = [tmp_path / name for name in ("fp32", "one", "two")]
    for exact, *others in zip(fp32, one, two, strict=True):
        for record in others:
            # bf16 rounds to within 2^-9; over 8 conversations most of that averages out.
            assert record["loss"] == pytest.approx(exact["loss"], rel=2**-11)
            assert record["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2**-6)
            assert record["loss"] != exact["loss"]  # it was bf16
    # Steps of 1e-4 on weights of 0.05, which bf16 rounds to multiples of 2.4e-4: in bf16 weights
    # most steps would be lost, or be too large. In fp32 ones the runs differ by bf16's noise in the
    # gradients (a twentieth of the way that the weights went, measured).
    start, exact, *others = (
        torch.cat([weight.float().ravel() for _, weight in sorted(load_file(file).items())])
        for file in (folder / "model.safetensors" for folder in (base, *outs))
    )
    for weights in others:
        assert (weights - exact).norm() < 0.1 * (exact - start.bfloat16()).norm()


def test_eight_conversations_are_memorised(base, conversations, tmp_path):
    """A model that sees the same eight conversations again and again gets them right."""
    data = tmp_path / "eight.jsonl"
    data.write_text("".join(Path(conversations).read_text().splitlines(True)[:8]))
    flags = ["--model", base, "--data", data, "--out", tmp_path / "out"]
    run_program("sft.py", *flags, "--epochs", 150, "--batch-size", 8, "--lr", 2e-2)
    losses = [record["loss"] for record in updates(tmp_path / "out")]
    assert losses[0] > 4 and losses[-1] < 0.1


def test_recomputation_and_compile_change_nothing_but_rounding(base, conversations, tmp_path):
    """The same losses with activations made twice, and with every block compiled."""
    flags = ["--model", base, "--data", conversations, "--batch-size", 4, "--max-steps", 2]
    flags += ["--lr", 1e-3, "--out"]
    run_program("sft.py", *flags, tmp_path / "plain")
    run_program("sft.py", *flags, tmp_path / "both", "--recompute", 2, "--compile")
    for a, b in zip(updates(tmp_path / "plain"), updates(tmp_path / "both"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_gpu_whose_memory_is_out_ends_the_run_in_one_line(base, conversations, tmp_path):
    """In the first update, say: what torch says of it, and which flags to change."""
    found = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 139.81 GiB, 1.20 GiB free"
    code = (
        "import runpy, torch, model\n"
        "def forward(*_, **__):\n"
        f"    raise torch.OutOfMemoryError('{found}. If reserved memory is large')\n"
        "model.Llama.forward = forward\n"
        "runpy.run_path('sft.py', run_name='__main__')"
    )
    flags = ["--model", base, "--data", conversations, "--out", tmp_path / "out"]
    command = [sys.executable, "-c", code, *map(str, flags), "--batch-size", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stderr.splitlines() if "update/s" not in line and line.strip()]
    assert done.returncode == 1
    assert lines == [f"error: {found}. {LESS_MEMORY}"]
