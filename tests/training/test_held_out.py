"""held_out.py: which records are held out, and what is logged of them, whatever befalls the run."""

import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from checkpoint.config import read_config
from checkpoint.resume import saved_runs
from checkpoint.run_folder import read_records
from checkpoint.weights import load_hf
from harm import LOG, harmed, recipe
from model import Llama
from pairs import their_logps
from program.ranks import start
from tokens.documents import Documents
from tokens.records import encode_conversation
from training.flags import RunFlags
from training.held_out import drawn, held_out_logps
from training.parallel import shard

EVAL_LOG, EVAL = ("training.held_out", "append_record"), ("training.held_out", "summed_logps")
NOISE = ("seconds", "tokens_per_second", "peak_memory_gib")


@pytest.fixture
def flags(base, conversations, tmp_path):
    """12 updates of which the 2nd, the 4th, … are followed by a measurement."""
    flags = recipe(base, conversations, tmp_path / "out")
    return flags | {"eval_data": [str(conversations)], "eval_every": 2, "save_every": 3}


@pytest.fixture(scope="module")
def undisturbed(base, conversations, tmp_path_factory):
    """The output folder of a run with these flags that nothing befell."""
    flags = recipe(base, conversations, tmp_path_factory.mktemp("undisturbed") / "out")
    flags |= {"eval_data": [str(conversations)], "eval_every": 2, "save_every": 3}
    assert harmed(flags) == 0
    return flags["out"]


def evals(out):
    """{update: its record} of the held-out data, each once."""
    records = read_records(Path(out) / "metrics.jsonl")
    found = [record for record in records if record.get("event") == "eval"]
    assert len({record["step"] for record in found}) == len(found)
    return {record["step"]: record for record in found}


def log_of(out):
    """All records but the starts, without what differs from one computer to the next."""
    records = [r for r in read_records(Path(out) / "metrics.jsonl") if r.get("event") != "start"]
    return [{k: v for k, v in record.items() if k not in NOISE} for record in records]


def update_losses(out):
    records = read_records(Path(out) / "metrics.jsonl")
    return {r["step"]: r for r in records if "step" in r and "event" not in r}


# ---- What is held out


def test_a_share_depends_on_seed_and_record_alone(base, conversations, tmp_path):
    """Not on what is too long; another seed draws others; a larger share draws more of them."""
    documents, short = (
        Documents([conversations], base, most, encode_conversation, tmp_path) for most in (999, 60)
    )
    assert 0 < len(short) < len(documents)

    def numbers(documents, seed, share):
        return set(documents.numbers[drawn(documents, seed, share), 0])

    chosen = numbers(documents, 1, 0.3)
    assert 0 < len(chosen) < len(documents)
    assert numbers(short, 1, 0.3) == chosen & set(short.numbers[:, 0])
    assert chosen < numbers(documents, 1, 0.6)
    assert numbers(documents, 2, 0.3) != chosen


def test_the_share_s_size_and_files(base, conversations, tmp_path):
    """About the share of many records, and of two files with the same content not the same."""
    lines = conversations.read_text().splitlines()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(lines * 40))
    documents = Documents([tmp_path], base, 999, encode_conversation)
    chosen = drawn(documents, 42, 0.1)
    # 1,920 draws: 192 expected, with a standard deviation of 13.
    assert abs(chosen.sum() - 192) < 5 * 13
    first, second = np.split(chosen, 2)
    assert (first != second).any()


def test_what_is_held_out_is_not_trained(base, conversations, tmp_path):
    """The parts make up the whole, and another part is other data to the facts and the caches."""
    documents = Documents([conversations], base, 999, encode_conversation, tmp_path)
    chosen = drawn(documents, 42, 0.3)
    trained, held_out = documents.part(~chosen), documents.part(chosen)
    numbers = [*trained.numbers[:, 0], *held_out.numbers[:, 0]]
    assert sorted(numbers) == sorted(documents.numbers[:, 0])
    assert len({documents.key, trained.key, held_out.key}) == 3
    i = int(np.flatnonzero(chosen)[1])
    assert np.array_equal(held_out[1][0][0], documents[i][0][0])


def test_a_run_trains_the_rest(base, conversations, tmp_path):
    """Its one update takes all that is not held out."""
    flags = recipe(base, conversations, tmp_path / "out") | {"batch_size": 24, "epochs": 1}
    assert harmed(flags | {"eval_share": 0.3}) == 0
    documents = Documents([conversations], base, 8192, encode_conversation)
    chosen = drawn(documents, 42, 0.3)
    assert update_losses(flags["out"])[1]["tokens"] == documents.lengths[~chosen].sum()
    assert list(evals(flags["out"])) == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eval_share": 0.001}, "--eval-share 0.001 takes none of the 24 conversations"),
        ({"eval_share": 0.999999}, "takes all of the 24 conversations, expected some"),
        ({"eval_share": 1.0}, "--eval-share is 1.0, expected a number from 0 to 1, 1 excluded"),
        ({"eval_every": 3}, "--eval-every needs held-out data: --eval-data or --eval-share"),
        ({"eval_data": ["no.jsonl"]}, "no.jsonl: no such file"),
        ({"eval_data": ["no.jsonl"], "eval_share": 0.1}, "both given, expected one of them"),
        ({"eval_share": 0.3, "eval_every": -1}, "--eval-every is -1"),
    ],
    ids=["none", "all", "one", "every", "absent", "both", "negative"],
)
def test_bad_flags(refused, flags, message):
    """By name, before anything is written."""
    assert message in refused(**flags)


# ---- What is measured


@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_is_that_of_the_next_update_on_the_same_data(base, conversations, tmp_path, ranks):
    """Where an update takes all the data, its loss was measured after the update before."""
    out = tmp_path / "out"
    flags = recipe(base, conversations, out) | {"batch_size": 24, "epochs": 5, "micro_tokens": 1000}
    assert harmed(flags | {"eval_data": [str(conversations)]}, ranks=ranks) == 0
    measured, losses = evals(out), update_losses(out)
    assert list(measured) == [1, 2, 3, 4, 5]  # an epoch is an update
    for step in range(1, 5):
        # Sums of fp32 values in another order.
        assert measured[step]["loss"] == pytest.approx(losses[step + 1]["loss"], rel=1e-5)
        assert measured[step]["perplexity"] == pytest.approx(np.exp(measured[step]["loss"]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_dpo_s_metrics_are_those_of_the_next_update(base, preferences, tmp_path, ranks):
    """Loss, rewards and log-probabilities, by reference log-probabilities of their own."""
    out, held_out = tmp_path / "out", tmp_path / "held_out.jsonl"
    held_out.write_bytes(preferences.read_bytes())
    flags = recipe(base, preferences, out) | {"batch_size": 19, "epochs": 4, "lr": 1e-3}
    flags |= {"eval_data": [str(held_out)], "eval_every": 1}
    assert harmed(flags, program="dpo", ranks=ranks) == 0
    measured, losses = evals(out), update_losses(out)
    for step in range(1, 4):
        for name in set(measured[step]) - {"event", "step"}:
            # Log-probabilities of some hundreds have fp32 errors of 1e-4, times beta in rewards.
            expected = losses[step + 1][name]
            assert measured[step][name] == pytest.approx(expected, rel=1e-5, abs=2e-4), name
    assert {"loss", "rewards/margins", "rewards/accuracies"} < set(measured[1])
    assert abs(measured[3]["rewards/margins"]) > 1e-2


def test_log_probabilities_are_transformers(base, conversations, tmp_path):
    """The sum over each conversation's trained tokens; and the model is left as training has it."""
    _, _, device = start()
    config = RunFlags(dtype="bfloat16")
    with torch.device("meta"):
        model = Llama(read_config(base))
    shard(model, config, device)
    load_hf(model, base)
    documents = Documents([conversations], base, 999, encode_conversation, tmp_path)
    run = SimpleNamespace(model=model, held_out=documents, per_epoch=3, last=12)
    config = SimpleNamespace(eval_every=2, micro_tokens=1000)
    assert all(held_out_logps(run, config, step, [], device) is None for step in (0, 1, 3))
    assert held_out_logps(run, config, 2, [15], device) is None  # a signal was received
    logps = held_out_logps(run, config, 2, [], device)
    assert model.training and all(isinstance(p, DTensor) for p in model.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected = their_logps(theirs, documents, range(len(documents)))
    counts = documents.trained_counts
    # A log-probability of about -6 in bf16, of 8 bits: each is off by 2^-8 of it at most.
    assert np.abs((logps - expected).numpy() / counts).max() < 6 * 2**-8
    assert np.abs(expected.numpy() / counts).min() > 4


@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), (1, "bfloat16")])
def test_measuring_a_sharded_model_changes_nothing_else(flags, tmp_path, ranks, dtype):
    """Though it is saved right after: the weights that FSDP gathered are let go."""
    flags |= {"epochs": 1, "eval_every": 1, "dtype": dtype}
    assert harmed(flags, ranks=ranks) == 0
    plain = flags | {"eval_data": None, "eval_every": 0, "out": str(tmp_path / "plain")}
    assert harmed(plain, ranks=ranks) == 0
    assert len(evals(flags["out"])) == 3
    ours, theirs = (load_file(Path(f["out"]) / "model.safetensors") for f in (flags, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_measuring_changes_nothing_else(flags, uninterrupted):
    """Losses and weights are those of a run without held-out data, bit for bit."""
    assert harmed(flags) == 0
    out = flags["out"]
    ours, theirs = (
        {s: r["loss"] for s, r in update_losses(p).items()} for p in (out, uninterrupted)
    )
    assert ours == theirs
    ours, theirs = (
        load_file(Path(folder) / "model.safetensors") for folder in (out, uninterrupted)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- Whatever befalls the run


def test_each_measurement_stands_in_the_log_once(flags, undisturbed):
    """Killed before or after one, or stopped in one: the log ends as if nothing had happened."""
    assert list(evals(undisturbed)) == [2, 4, 6, 8, 10, 12]
    for number, at, calls in (
        (signal.SIGKILL, 4, [LOG]),  # after the measurement of 2, before the checkpoint of 3
        (signal.SIGKILL, 2, [EVAL]),  # within that of 4, after the checkpoint
        (signal.SIGTERM, 2, [EVAL]),  # within that of 6: 6 is saved without it
        (signal.SIGKILL, 1, [EVAL_LOG]),  # when it is to be logged, at last
        (signal.SIGTERM, 1, [LOG]),  # in update 7
        (signal.SIGKILL, 2, [EVAL_LOG]),  # of 10
    ):
        status = harmed(flags, number, at, calls)
        assert status in (-signal.SIGKILL, 128 + signal.SIGTERM), (number, at, calls)
    assert harmed(flags) == 0
    assert log_of(flags["out"]) == log_of(undisturbed)
    ours, theirs = (load_file(Path(p) / "model.safetensors") for p in (flags["out"], undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_signal_while_measuring_is_obeyed_at_once(base, conversations, tmp_path):
    """Not after the thousands of records to come: the update's state is saved, and that is all."""
    out, many = tmp_path / "out", tmp_path / "many.jsonl"
    many.write_text(conversations.read_text() * 10)  # 240 records, four parts on one rank
    flags = recipe(base, conversations, out) | {"eval_data": [str(many)]}
    assert harmed(flags, signal.SIGTERM, 2, [EVAL]) == 128 + signal.SIGTERM
    assert [place.name for place in saved_runs(out)] == ["step-000003"]  # the first epoch's end
    assert not evals(out) and not (out / "config.json").exists()
    assert harmed(flags) == 0
    assert list(evals(out)) == [3, 6, 9, 12]
