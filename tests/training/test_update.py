"""update.py and flags.py: schedule, optimizer, FLOPs and flags against independent code."""

import math
import os
from dataclasses import dataclass, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from benchmarks.step import LLAMA_2_7B
from model import Llama, LlamaConfig
from program.errors import InputError, RunError
from program.flags import check_flags, parse_args, resolve, run_facts
from program.hardware import peak_memory_gib
from sft import SFTConfig
from training import update
from training.update import (
    check_finite,
    clip_gradients,
    learning_rate,
    make_optimizer,
    model_flops,
    warmup_updates,
)

# ---- Learning rate


@pytest.mark.parametrize(
    "total, ratio, warmup",
    [
        (5096, 0.03, 153),  # Tulu 2's SFT: 152.88, up
        (5808, 0.1, 581),  # its DPO: 580.8, up
        (30, 0.1, 3),  # 0.1 · 30 is 3.0000000000000004 in floating point
        (100, 0.07, 7),  # 7.000000000000001
        (1, 0.03, 0),  # its only update has the full rate
        (1, 1, 0),
        (2, 0.03, 1),
        (2, 1, 1),
        (7, 0, 0),
        (7, 0.9, 6),  # 6.3, up to 7, would be all
        (7, 1, 6),
    ],
)
def test_warmup_is_the_ratio_rounded_up(total, ratio, warmup):
    """Whole numbers stay what they are, whatever floating point makes of them; never all updates.

    So some update has the peak rate, and none after the first has 0.
    """
    assert warmup_updates(total, ratio) == warmup
    rates = [learning_rate(step, total, 2e-5, ratio) for step in range(total)]
    assert max(rates) == rates[warmup] == 2e-5
    assert min(rates[1:], default=1) > 0


@pytest.mark.parametrize(
    "total, ratio", [(5096, 0.03), (5808, 0.1), (30, 0.1), (10, 0), (10, 1), (1, 0.03), (1, 0)]
)
def test_learning_rate_equals_the_formula_and_transformers(total, ratio):
    """At every step: peak·k/w below w, then peak·(n - k)/(n - w)."""
    peak, warmup = 2e-5, warmup_updates(total, ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        if step < warmup:
            expected = peak * step / warmup
        else:
            expected = peak * (total - step) / (total - warmup)
        lr = learning_rate(step, total, peak, ratio)
        assert lr == pytest.approx(expected, rel=1e-12)
        assert lr == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step(), schedule.step()
    assert learning_rate(warmup, total, peak, ratio) == peak
    if warmup:
        assert learning_rate(0, total, peak, ratio) == 0 < learning_rate(total - 1, total, 1, ratio)


# ---- Optimizer


@pytest.mark.parametrize("size", [1, 1e-7])  # of the gradients; beside the second, eps counts
def test_adamw_equals_its_formula_for_ten_steps(size):
    """Loshchilov and Hutter's update, written out in fp64, with decay, and torch's reference."""
    config = SimpleNamespace(lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    model = torch.nn.ParameterList([torch.nn.Parameter(start.clone())])
    reference = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer(model, config)
    plain = torch.optim.AdamW(
        [reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    w, m, v = start.double(), 0, 0
    for t in range(1, 11):
        gradient = size * torch.randn(7, 5, generator=generator)
        lr = learning_rate(t, 20, config.lr, 0.25)
        for each, parameter in ((optimizer, model[0]), (plain, reference)):
            parameter.grad = gradient.clone()
            each.param_groups[0]["lr"] = lr
            each.step()
        g = gradient.double()
        w = w - lr * 0.1 * w
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    # Ten fp32 updates of weights of order one: ten roundings of 6e-8.
    torch.testing.assert_close(model[0].detach(), reference.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[0].detach().double(), w, rtol=1e-6, atol=1e-6)
    assert (model[0].detach() - start).abs().min() > 1e-4


def test_every_weight_decays_norms_too():
    """Where all gradients are 0, one update takes lr·decay of every weight, of whatever shape."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(11, 8, 12, 2, 4, 2, 2, 1e-5, 1e4, False))
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, 1, 2)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_optimizer(model, SimpleNamespace(lr=0.5, beta1=0.9, beta2=0.95, weight_decay=0.5)).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * 0.75), name
    assert {w.dim() for w in before.values()} == {1, 2}


@pytest.mark.parametrize("clip, scale", [(1.0, 1 / 13), (26.0, 1), (0, 1)])
def test_clipping(clip, scale):
    """Gradients of norm 13 are scaled to `clip`, if that is less; 0 is none; 13 is returned."""
    model = torch.nn.ParameterList([torch.zeros(2), torch.zeros(1)])
    model[0].grad, model[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert clip_gradients(model, clip) == pytest.approx(13)
    # torch divides by the norm + 1e-6.
    torch.testing.assert_close(model[0].grad, torch.tensor([3.0, 4.0]) * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-6, 0.5, 1, 3e7])  # of the limit; below 1, torch's 1e-6 counts
def test_clipping_is_torchs_bit_for_bit_and_leaves_short_gradients_alone(size):
    """At norms around the limit, of which torch's fp32 rounding makes what it likes, and far off.

    Gradients well below the limit are not even multiplied by 1: no kernel writes them.
    """
    direction = torch.randn(101, generator=torch.Generator().manual_seed(0))
    direction /= direction.norm()
    scaled = 0
    for ratio in [0, 0.1, 0.99, *(1 + 2e-7 * k for k in range(-20, 21)), 7]:
        ours, theirs = (torch.nn.ParameterList([torch.zeros(101)]) for _ in range(2))
        for model in (ours, theirs):
            model[0].grad = direction * (size * ratio)
        version = ours[0].grad._version
        norm = clip_gradients(ours, size)
        assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), size).item()
        assert torch.equal(ours[0].grad, theirs[0].grad)
        changed = not torch.equal(ours[0].grad, direction * (size * ratio))
        scaled += changed
        assert (ours[0].grad._version > version) == (norm + 1e-6 > 0.999 * size) >= changed
    assert scaled > 10


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_stops_the_run(loss, norm):
    """Naming the update and its data."""
    documents = SimpleNamespace(names=lambda members: (f"file:{i}" for i in members))
    with pytest.raises(RunError, match=r"update 7: .*file:3, file:5"):
        check_finite(7, loss, norm, documents, [3, 5])
    check_finite(7, 1.0, 2.0, documents, [3, 5])


def test_peak_memory_is_in_gib():
    """On a CPU: over the 50 MiB that torch alone needs, and no more than the machine has."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < machine


# ---- FLOPs


def test_flops_counted_by_hand():
    """A tiny model, every matrix product written out: 2 for each multiplication and addition."""
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
    )
    per_token = 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 12)  # q, k, v, o, and the MLP
    # Documents of 5 and 2 tokens: QKᵀ and PV over 4 heads of 2, and half of it masked.
    attention = sum(2 * (2 * n * n * 4 * 2) / 2 for n in (5, 2))
    head = 2 * 8 * 11 * 4  # 4 predicted tokens
    forward = 3 * (7 * per_token + attention) + head
    assert model_flops(config, [5, 2], 4) == 3 * forward


def test_flops_of_a_pair_count_its_prompt_once():
    """Prompt 3, answers 2 and 4: 9 tokens, and every query's keys counted, halved as above."""
    config = LlamaConfig(11, 8, 12, 3, 4, 2, 2, 1e-5, 1e4, False)
    per_token = 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 12)
    # Squares of the lengths are twice the seen pairs, less half of the diagonal: 5² and 7², of
    # which the prompt's 3² is in both.
    attention = 2 * (2 * (5 * 5 + 7 * 7 - 3 * 3) * 4 * 2) / 2
    forward = 3 * (9 * per_token + attention) + 2 * 8 * 11 * 6
    assert model_flops(config, [5, 7], 6, shared=[0, 3]) == 3 * forward


def test_flops_with_lora_are_two_products_of_a_frozen_weight_and_three_of_an_adapters():
    """Forward, and the gradient of the input; the gradient of A and B besides. Rank 3, 7 tokens."""
    config = LlamaConfig(11, 8, 12, 3, 4, 2, 2, 1e-5, 1e4, False)
    # (inputs, outputs) of q, k, v, o, gate, up, down.
    projections = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 12), (8, 12), (12, 8)]
    frozen = sum(2 * 7 * K * N for K, N in projections)
    adapters = sum(2 * 7 * 3 * K + 2 * 7 * N * 3 for K, N in projections)
    attention = sum(2 * (2 * n * n * 4 * 2) / 2 for n in (5, 2))
    head = 2 * 8 * 11 * 4
    expected = 3 * (2 * frozen + 3 * adapters + 3 * attention) + 2 * head
    assert model_flops(config, [5, 2], 4, lora_rank=3) == expected


@pytest.mark.parametrize("rank", [0, 5])
def test_mfu_is_of_the_flops_that_the_run_needs(monkeypatch, rank):
    """Records 1 and 3 in half a second, on two GPUs of 1 GFLOP/s."""
    monkeypatch.setattr(update, "peak_flops", lambda device: 1e9)
    lengths = np.array([[9], [5], [8], [2]])
    documents = SimpleNamespace(
        tokens=lengths[:, 0], lengths=lengths, shared=0 * lengths, trained_counts=lengths - 1
    )
    config = LlamaConfig(11, 8, 12, 3, 4, 2, 2, 1e-5, 1e4, False)
    flags = SimpleNamespace(lora_rank=rank)
    run = SimpleNamespace(documents=documents, model=SimpleNamespace(config=config), config=flags)
    record = update.measurements(run, np.array([1, 3]), 0.5, torch.device("cpu"), world=2)
    assert record["tokens"] == 7 and record["trained_tokens"] == 5
    flops = model_flops(config, [5, 2], 5, lora_rank=rank)
    assert record["mfu"] == pytest.approx(flops / 0.5 / 1e9 / 2)


def test_flops_of_llama_2_7b_are_6n():
    """6.607 billion weights in matrix products (all but embedding and norms): 6 each a token, and
    6·T²·H·D a layer for attention: 3.22 GFLOP a token at T = 4,096."""
    with torch.device("meta"):
        model = Llama(LLAMA_2_7B)
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if "norm" not in n and "embed" not in n
    )
    assert matrices == pytest.approx(6.607e9, rel=1e-4)
    flops = model_flops(LLAMA_2_7B, [4096], 4096) / 4096
    assert flops == 6 * matrices + 32 * 6 * 4096 * 4096
    assert flops - 6 * matrices == pytest.approx(3.22e9, rel=1e-3)


def test_flops_do_not_overflow():
    """128 documents of 8,192 tokens given as numpy's int32, as an int."""
    config = LlamaConfig(32000, 8192, 28672, 80, 64, 8, 128, 1e-5, 1e4, False)
    lengths = np.full(128, 8192, np.int32)
    assert model_flops(config, lengths, np.int32(9)) == model_flops(config, [8192] * 128, 9)


# ---- Flags


DESIGN_DEFAULTS = {
    "model": None, "data": None, "out": "runs/sft", "epochs": 2, "batch_size": 128,
    "max_seq_len": 8192, "lr": 2e-5, "warmup_ratio": 0.03, "weight_decay": 0, "beta1": 0.9,
    "beta2": 0.95, "clip": 1.0, "micro_tokens": 16384, "max_steps": 0, "save_every": 0, "keep": 2,
    "keep_checkpoints": False, "too_long": "cut", "eval_data": None, "eval_share": 0,
    "eval_every": 0, "export_every": None, "keep_exports": 0,
    "export_merged": False, "tensorboard": False, "wandb": False,
    "lora_rank": 0, "lora_alpha": 16, "lora_dropout": 0.1, "quantize": None,
    "seed": 42, "dtype": None, "recompute": None, "replicas": 1, "compile": None,
}  # fmt: skip


def test_defaults_are_tulu_2s():
    """Exactly the flags and defaults of the design's table."""
    assert vars(SFTConfig()) == DESIGN_DEFAULTS
    assert parse_args(SFTConfig, []) == {}


def test_flags_are_read():
    """Dashes for underscores, the field's type, several paths, and --no- for what is on or off."""
    argv = "--model m --data a b.jsonl --data c --batch-size 7 --lr 1e-4 --no-compile --recompute 3"
    assert parse_args(SFTConfig, argv.split()) == {
        "model": "m",
        "data": ["a", "b.jsonl", "c"],
        "batch_size": 7,
        "lr": 1e-4,
        "compile": False,
        "recompute": 3,
    }


@pytest.mark.parametrize(
    "argv", ["--nonsense 1", "--batch 7", "--batch-size x", "--batch-size 1.5", "--lr", "stray"]
)
def test_bad_flags_are_refused(argv):
    """Unknown, shortened, of another type, without a value."""
    with pytest.raises(InputError, match="--help lists the flags"):
        parse_args(SFTConfig, argv.split())


def test_help_mentions_every_flag_and_its_default(capsys):
    """The comment behind each field is its help."""
    with pytest.raises(SystemExit):
        parse_args(SFTConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(SFTConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.default is None or f"(default: {field.default})" in text
    assert "--no-compile" in text and "conversations in one update, all ranks together" in text


@dataclass(frozen=True)
class WithPercent:
    share: float = 0.5  # 50 % of all


def test_a_percent_sign_in_a_help_text_is_one(capsys):
    """argparse would take it for a format."""
    with pytest.raises(SystemExit):
        parse_args(WithPercent, ["--help"])
    assert "50 % of all" in capsys.readouterr().out


def valid(**changes):
    return resolve(SFTConfig(**{"model": "m", "data": ["d"]} | changes), torch.device("cpu"))


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0}, {"batch_size": 0}, {"batch_size": -1}, {"max_seq_len": 1}, {"lr": 0.0},
        {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"warmup_ratio": 1.01},
        {"warmup_ratio": -0.1}, {"weight_decay": -1.0}, {"beta1": 1.0}, {"beta2": 1.0},
        {"beta2": math.nan}, {"clip": -1.0}, {"clip": math.inf}, {"micro_tokens": 1},
        {"max_steps": -1}, {"save_every": -1}, {"keep": 0}, {"seed": -1}, {"dtype": "float16"},
        {"recompute": -1}, {"replicas": 0},
        {"dtype": "int8"}, {"data": None}, {"model": None},
    ],
    ids=str,
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused(changes):
    """Each is named, with what was found."""
    with pytest.raises(InputError, match="--" + next(iter(changes)).replace("_", "-")):
        check_flags(valid(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"clip": 0}, {"warmup_ratio": 0}, {"warmup_ratio": 1}, {"beta1": 0.0},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)  # fmt: skip
def test_flags_at_their_bounds_are_allowed(changes):
    """No clipping, no warm-up, nothing but warm-up, no momentum."""
    check_flags(valid(**changes))


def test_device_decides_what_is_not_said():
    """float32 and nothing extra on CPU; bfloat16 and compilation on a GPU, whose memory decides how
    many blocks recompute, unless that is said."""
    names = ("dtype", "recompute", "compile")
    cpu, gpu = (resolve(SFTConfig(), torch.device(d)) for d in ("cpu", "cuda"))
    assert [getattr(cpu, n) for n in names] == ["float32", 0, False]
    assert [getattr(gpu, n) for n in names] == ["bfloat16", None, True]
    said = resolve(SFTConfig(dtype="float32", recompute=3, compile=False), torch.device("cuda"))
    assert [getattr(said, n) for n in names] == ["float32", 3, False]


def test_a_run_is_what_it_computes(tmp_path):
    """Layout and saving do not make another run; what changes the weights does."""
    base = valid(model=str(tmp_path))
    same = {"micro_tokens": 99, "max_steps": 3, "save_every": 5, "keep": 4, "out": "x"}
    same |= {"keep_checkpoints": True, "recompute": 2, "replicas": 2}
    assert run_facts(valid(model=f"{tmp_path}/.", **same)) == run_facts(base)
    other = {"epochs": 3, "batch_size": 4, "max_seq_len": 9, "lr": 1e-4, "warmup_ratio": 0.1}
    other |= {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "clip": 2.0, "seed": 1}
    other |= {"dtype": "bfloat16", "model": "elsewhere"}
    for name, value in other.items():
        assert run_facts(valid(**{"model": str(tmp_path), name: value})) != run_facts(base), name
