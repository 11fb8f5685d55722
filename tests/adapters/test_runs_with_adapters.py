"""Whole runs with adapters: rows, ranks, types, recomputation, resuming, DPO, and bad flags."""

import math
import os
import resource
import shutil
import signal

import pytest
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

import sft
from adapted import adapted
from adapters.merge import MergeConfig, merge
from checkpoint import disk, weights
from checkpoint.adapter_folder import KEY, TENSORS
from conftest import updates
from harm import LAST, LOG, PROGRAMS, harmed, recipe
from program.errors import InputError, RunError
from program.ranks import start
from tokens.tokenizer import Tokenizer
from training import setup

QLORA = {"lora_rank": 4, "quantize": "nf4", "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def whole(wide, conversations, tmp_path_factory):
    """A run of QLoRA that nothing befell."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert harmed(recipe(wide, conversations, out) | QLORA) == 0
    return out


def same(one, other):
    """The names of the tensors that differ between two runs' adapters and models."""
    names = ("adapter/adapter_model.safetensors", "model.safetensors")
    return [n for n in names if (one / n).read_bytes() != (other / n).read_bytes()]


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_run_that_was_interrupted_ends_bit_for_bit_as_if_it_was_not(
    whole, wide, conversations, tmp_path, harm
):
    """With dropout, of which no state is kept; checkpoints hold what is trained and no more."""
    flags = recipe(wide, conversations, tmp_path / "out") | QLORA | {"save_every": 2}
    assert harmed(flags, harm, at=5, calls=[LOG]) != 0
    newest = max((tmp_path / "out" / "checkpoints").iterdir())
    kept = FileSystemReader(newest).read_metadata().state_dict_metadata
    tensors = [name for name, facts in kept.items() if getattr(facts, "size", None)]
    assert len(tensors) == 3 * 28  # A or B and its two moments, on fourteen projections
    assert all(".lora_" in name for name in tensors)
    assert harmed(flags) == 0
    assert len(updates(tmp_path / "out")) == LAST
    assert same(tmp_path / "out", whole) == []


@pytest.mark.parametrize(
    "changes, ranks",
    [({"micro_tokens": 700}, 1), ({"micro_tokens": 900}, 3), ({"recompute": 2}, 1)],
    ids=["rows", "ranks", "recompute"],
)
def test_layout_changes_nothing_but_rounding(whole, wide, conversations, tmp_path, changes, ranks):
    """With dropout: a document draws the same in any row, on any rank. Recomputed, bit for bit."""
    flags = recipe(wide, conversations, tmp_path / "out") | QLORA | {"max_steps": 4}
    assert harmed(flags | changes, ranks=ranks) == 0
    for record, other in zip(updates(tmp_path / "out"), updates(whole), strict=False):
        rel = 0 if "recompute" in changes else 1e-4
        assert record["loss"] == pytest.approx(other["loss"], rel=rel)
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * rel)


def test_models_on_the_way_are_adapters_or_merged(wide, conversations, tmp_path):
    """By default the adapter alone; merged into the base, it is what --export-merged leaves."""
    for name, merged in (("alone", False), ("merged", True)):
        flags = recipe(wide, conversations, tmp_path / name) | QLORA | {"max_steps": 4}
        assert harmed(flags | {"export_every": "2", "export_merged": merged}, ranks=2) == 0
    alone, merged = (tmp_path / name / "step-000002" for name in ("alone", "merged"))
    assert sorted(os.listdir(alone)) == ["adapter_config.json", "adapter_model.safetensors"]
    start()
    merge(MergeConfig(str(wide), str(alone), str(tmp_path / "out")))
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (merged / file).read_bytes()


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_the_base_is_hashed_once(wide, conversations, preferences, tmp_path, monkeypatch, program):
    """Before training; every adapter that is saved names that hash."""
    monkeypatch.setattr(weights, "weights_key", None)  # it cannot be called where models are saved
    data = conversations if program == "sft" else preferences
    flags = recipe(wide, data, tmp_path / "out") | {"lora_rank": 4, "max_steps": 3, "lr": 1e-3}
    PROGRAMS[program].main(flags | {"export_every": "2"})
    monkeypatch.undo()
    for name in ("step-000002", "adapter"):
        with safe_open(tmp_path / "out" / name / TENSORS, "pt") as file:
            assert file.metadata()[KEY] == weights.weights_key(wide)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a model"])
def test_a_full_disk_while_an_adapter_is_written_is_told(wide, tmp_path, alone):
    """One error with the disk's reason, and nothing half made stays. Here no file may have more
    than 4 KiB."""
    start()
    model, out = adapted(wide), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match="could not be saved .File too large"):
            if alone:
                weights.save_adapter(model, wide, out, {"weights": "0"})
            else:
                weights.save_hf(model, Tokenizer(wide), wide, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in out.rglob("*") if path.is_file()] == []


def test_the_disk_is_asked_for_adapters_alone(wide, conversations, tmp_path, monkeypatch):
    """Of 12 updates, five models on the way: one byte less than model, checkpoint and they take is
    refused. Merged they are whole models."""
    model = adapted(wide, lora_rank=4)
    sizes = disk.model_bytes(model), disk.adapter_bytes(model)
    flags = recipe(wide, conversations, tmp_path / "out") | {"lora_rank": 4, "export_every": "2"}
    for merged, export in ((False, sizes[1]), (True, sizes[0])):
        needed = sizes[0] + 5 * export + 3 * sizes[1]  # three fp32 numbers, of what is trained
        for missing, found in ((1, "5 on the way"), (0, "another run is writing")):
            usage = shutil.disk_usage(tmp_path)._replace(free=needed - missing)
            monkeypatch.setattr(disk.shutil, "disk_usage", lambda _, usage=usage: usage)
            monkeypatch.setattr(setup, "lock_output", busy)
            with pytest.raises(InputError, match=found):
                sft.main(flags | {"export_merged": merged})


def busy(out):
    """`lock_output` where another run has the folder: the disk had room enough."""
    raise InputError("another run is writing there")


@pytest.mark.parametrize("quantize", [None, "nf4"], ids=str)
def test_two_ranks_in_bf16_train_as_one_does(wide, conversations, tmp_path, quantize):
    """One rank keeps frozen weights to itself, two shard them: bf16's rounding apart."""
    losses = []
    for ranks in (1, 2):
        flags = recipe(wide, conversations, tmp_path / str(ranks)) | QLORA
        flags |= {"quantize": quantize, "dtype": "bfloat16", "max_steps": 4}
        assert harmed(flags, ranks=ranks) == 0
        losses.append([record["loss"] for record in updates(tmp_path / str(ranks))])
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)  # means of hundreds of bf16 results
    assert losses[0][3] < losses[0][0] - 0.05


def test_dpos_reference_is_the_model_without_adapters(wide, preferences, tmp_path, monkeypatch):
    """The first loss is ln 2, on two ranks, quantised; resumed, the reference is still the base."""
    flags = {"model": str(wide), "data": [str(preferences)], "batch_size": 5, "lr": 1e-2}
    flags |= QLORA | {"epochs": 2, "warmup_ratio": 0.0, "save_every": 1}
    first = flags | {"out": str(tmp_path / "whole")}
    assert harmed(first, program="dpo") == 0
    losses = [record["loss"] for record in updates(tmp_path / "whole")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[-1] - losses[0]) > 1e-3
    for path in preferences.parent.glob("*.reference-*"):
        path.unlink()
    again = flags | {"out": str(tmp_path / "again")}
    assert harmed(again, signal.SIGKILL, at=4, calls=[("dpo", "append_record")], program="dpo") != 0
    for path in preferences.parent.glob("*.reference-*"):
        path.unlink()
    assert harmed(again, program="dpo") == 0
    assert same(tmp_path / "again", tmp_path / "whole") == []
    two = flags | {"out": str(tmp_path / "two")}
    assert harmed(two, program="dpo", ranks=2) == 0
    assert [r["loss"] for r in updates(tmp_path / "two")] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"quantize": "nf4"}, "--quantize nf4 without --lora-rank"),
        ({"quantize": "int8", "lora_rank": 4}, "--quantize is int8, expected nf4"),
        ({"lora_rank": 17}, "--lora-rank is 17, expected at most 16"),
        ({"lora_rank": -1}, "--lora-rank is -1, expected an integer from 0 up"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora-alpha is 0.0, expected a number from 0 up"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "--lora-dropout is 1.0, expected"),
        ({"lora_rank": 4, "quantize": "nf4"}, "hidden_size is 32, expected a multiple of 64"),
    ],
    ids=["rank 0", "int8", "above", "negative", "alpha", "dropout", "width"],
)
def test_bad_flags(refused, flags, message):
    """By name, before anything is written; the base's narrowest projection has 16 rows."""
    assert message in refused(**flags)
