"""Runs of several replicas (HSDP): their checkpoints, written once, and how other layouts go on."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.config import read_config
from checkpoint.disk import checkpoint_bytes
from checkpoint.resume import saved_runs
from conftest import updates
from harm import LAST, LOG, assert_same_run, harmed, losses, recipe, steps
from model import Llama


@pytest.fixture(scope="module")
def runs(base, conversations, tmp_path_factory):
    """A run of 2 replicas of 2 ranks, and one that a signal stopped after update 5; their flags.

    Rows of 500 tokens: some ranks have several, some none.
    """
    folder = tmp_path_factory.mktemp("replicas")
    flags = recipe(base, conversations, folder / "whole") | {"replicas": 2, "micro_tokens": 500}
    assert harmed(flags, ranks=4) == 0
    stopped = flags | {"out": str(folder / "stopped")}
    assert harmed(stopped, signal.SIGTERM, 5, [LOG], ranks=4, struck=0) == 128 + signal.SIGTERM
    return flags, stopped


def test_replicas_train_as_one_process_does(runs, uninterrupted):
    """Every figure of 12 updates, all conversations of which the four ranks share."""
    one = updates(uninterrupted)
    for k, (a, b) in enumerate(zip(updates(Path(runs[0]["out"])), one, strict=True)):
        assert a["tokens"] == b["tokens"] and a["trained_tokens"] == b["trained_tokens"]
        # Before the first step only rounding differs. AdamW's first updates then divide by the
        # gradient's size: rounding (1e-7) grows a thousandfold.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6 if k == 0 else 1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if k == 0 else 1e-2)


def test_a_checkpoint_of_replicas_is_written_once(runs, base):
    """Its files hold each weight and moment once, and every rank writes a part of them."""
    (place,) = saved_runs(runs[1]["out"])
    sizes = [path.stat().st_size for path in place.glob("*.distcp")]
    needed = checkpoint_bytes(Llama(read_config(base)))
    names = 66 * 4 * 2**10  # of 66 tensors on 4 ranks: each part has a header of under a KiB
    assert len(sizes) == 4 and needed <= sum(sizes) < needed + names < 2 * needed
    assert min(sizes) > needed / 8


def test_the_same_replicas_go_on_bit_for_bit(runs, tmp_path):
    """The run that was stopped equals the one that was not: the log, and every saved weight."""
    flags = runs[1] | {"out": str(tmp_path / "out")}
    shutil.copytree(runs[1]["out"], flags["out"])
    assert harmed(flags, ranks=4) == 0
    assert_same_run(flags["out"], runs[0]["out"])


@pytest.mark.parametrize("ranks, replicas", [(1, 1), (2, 2), (3, 1)])
def test_other_ranks_and_replicas_go_on(runs, tmp_path, ranks, replicas):
    """One rank, two that hold all weights each, or three that share them: up to rounding."""
    flags = runs[1] | {"out": str(tmp_path / "out"), "replicas": replicas}
    shutil.copytree(runs[1]["out"], flags["out"])
    assert harmed(flags, ranks=ranks) == 0
    assert steps(flags["out"]) == list(range(1, LAST + 1))
    assert losses(flags["out"])[:5] == losses(runs[0]["out"])[:5]
    assert losses(flags["out"]) == pytest.approx(losses(runs[0]["out"]), rel=1e-4)


def test_dpo_on_replicas_equals_one_process(base, preferences, tmp_path):
    """The reference's log-probabilities, too: each rank's share of the pairs, summed over all."""
    flags = {"model": str(base), "batch_size": 6, "max_steps": 2, "lr": 1e-3}
    for out, ranks, replicas in (("one", 1, 1), ("four", 4, 2)):
        data = shutil.copy(preferences, tmp_path / f"{out}.jsonl")  # with a reference of its own
        flags |= {"data": [str(data)], "out": str(tmp_path / out), "replicas": replicas}
        assert harmed(flags, ranks=ranks, program="dpo") == 0
    for a, b in zip(updates(tmp_path / "one"), updates(tmp_path / "four"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        # Log-probabilities of some -50 in fp32: 1e-5 of rounding, of which margins are differences.
        assert a["logps/chosen"] == pytest.approx(b["logps/chosen"], rel=1e-5)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], rel=1e-3, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_qlora_on_replicas_equals_one_process(wide, conversations, tmp_path):
    """Codes are cut over a replica's two ranks and scales are whole; dropout draws the same.

    The loss before the first step is that of the same weights, quantised on other ranks.
    """
    flags = {"lora_rank": 4, "quantize": "nf4", "lora_dropout": 0.2, "max_steps": 4}
    flags |= {"micro_tokens": 900, "warmup_ratio": 0.0}
    for out, ranks, replicas in (("one", 1, 1), ("four", 4, 2)):
        run = recipe(wide, conversations, tmp_path / out) | flags | {"replicas": replicas}
        assert harmed(run, ranks=ranks) == 0
    one, four = (updates(tmp_path / out) for out in ("one", "four"))
    assert len(one) == 4 and one[3]["loss"] < one[0]["loss"] - 0.05
    for k, (a, b) in enumerate(zip(four, one, strict=True)):
        # Rounding, and after AdamW's first updates, rounding over small gradients: see above.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6 if k == 0 else 1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if k == 0 else 1e-2)
    # A thousand times the rounding of fp32, of weights that moved by some 1e-2; then one of bf16.
    for name, rtol in (("adapter/adapter_model.safetensors", 1e-4), ("model.safetensors", 2**-7)):
        ours, theirs = (load_file(tmp_path / out / name) for out in ("four", "one"))
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            torch.testing.assert_close(weight.float(), theirs[key].float(), rtol=rtol, atol=1e-5)
