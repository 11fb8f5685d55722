"""dpo.py: pairs, loss and reference alone, and the program against a plain transformers loop."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dpo
from chat import Tokenizer
from data import Documents, update_members
from errors import InputError, RunError
from logps import answer_logps, reference_logps
from model import Llama, LlamaConfig
from parallel import shard, start
from schemas import encode_pair
from training import learning_rate

ROOT = Path(__file__).parent.parent


def message(role, content):
    return {"role": role, "content": content}


def pair(prompt, chosen, rejected, **more):
    """A record of UltraFeedback's schema, with prompt a list of messages."""
    sides = {"chosen": chosen, "rejected": rejected}
    return {side: [*prompt, message("assistant", answer)] for side, answer in sides.items()} | more


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Path of 19 pairs of various lengths, some with several turns before the answer."""
    rng, words = random.Random(5), "the quick brown fox answers no more questions today".split()

    def text(most):
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    records = []
    for k in range(19):
        prompt = [message("user", text(9))]
        if k % 3 == 0:
            prompt += [message("assistant", text(9)), message("user", text(9))]
        records.append(pair(prompt, text(3 + 2 * k), text(12), prompt_id=f"p{k}"))
    return write(tmp_path_factory.mktemp("pairs") / "preferences.jsonl", records)


def run_dpo(*flags, ranks=None):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, "dpo.py", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[:2000]
    return done.stdout


def updates(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "step" in record]


# ---- The loss


def test_loss_of_five_numbers():
    """-log sigmoid(0.1 · ((-3 + 4) - (-7 + 5))) = -log sigmoid(0.3), by hand."""
    numbers = (torch.tensor([float(x)]) for x in (-3, -7, -4, -5))
    loss, chosen, rejected = dpo.dpo_loss(*numbers, beta=0.1)
    assert chosen.item() == pytest.approx(0.1) and rejected.item() == pytest.approx(-0.2)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.3)))


def test_loss_starts_at_ln_2_and_survives_large_margins():
    """Policy = reference gives ln 2; margins of ±1e4 give 0 and 1e4·beta, no infinity."""
    same = torch.tensor([-1.0, -50.0, -3000.0])
    assert torch.allclose(dpo.dpo_loss(same, same, same, same, 0.1)[0], torch.tensor(math.log(2)))
    zero, far = torch.zeros(2), torch.tensor([1e4, -1e4])
    loss, _, _ = dpo.dpo_loss(far, zero, zero, zero, beta=0.1)
    assert loss.tolist() == pytest.approx([0.0, 1e3])


def test_gradient_has_the_closed_form():
    """dL/d(policy_chosen) = -beta · sigmoid(rejected_reward - chosen_reward), section 4."""
    torch.manual_seed(0)
    logps = torch.randn(4, 101, dtype=torch.float64) * 20
    policy_chosen, policy_rejected, *reference = logps
    policy_chosen.requires_grad_(), policy_rejected.requires_grad_()
    loss, chosen, rejected = dpo.dpo_loss(policy_chosen, policy_rejected, *reference, beta=0.3)
    weights = torch.rand(101, dtype=torch.float64)
    (loss * weights).sum().backward()
    expected = weights * 0.3 * torch.sigmoid(rejected - chosen).detach()
    torch.testing.assert_close(policy_chosen.grad, -expected)
    torch.testing.assert_close(policy_rejected.grad, expected)


# ---- Pairs


def test_only_the_last_answer_is_trained(base):
    """Earlier assistant turns are context; the trained tokens are the answer's and its EOS."""
    tokenizer = Tokenizer(base)
    prompt = [message("user", "a"), message("assistant", "earlier"), message("user", "b")]
    for (ids, trained), answer in zip(
        encode_pair(pair(prompt, "yes it is", "no"), tokenizer), ("yes it is", "no"), strict=True
    ):
        kept = [i for i, mark in zip(ids, trained, strict=True) if mark]
        assert kept[-1] == tokenizer.eos_id and tokenizer.visible(kept[:-1]) == answer
        assert ids == tokenizer.encode([*prompt, message("assistant", answer)])[0]


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"chosen": [message("user", "a"), message("assistant", "b")]}, "rejected is nothing"),
        (pair([message("user", "a")], "b", 5), r"rejected\[1\].content is 5"),
        (pair([message("user", "a")], "b", "c") | {"chosen": []}, "chosen is "),
        (
            pair([message("user", "a")], "b", "c") | {"chosen": [message("user", "a")]},
            "chosen ends with user",
        ),
        (
            {
                "chosen": [message("user", "a"), message("assistant", "b")],
                "rejected": [message("user", "other"), message("assistant", "b")],
            },
            "different prompts",
        ),
    ],
)
def test_bad_pairs_are_named(record, problem, base, tmp_path):
    """File, line, side and what was found."""
    good = pair([message("user", "a")], "b", "c")
    path = write(tmp_path / "pairs.jsonl", [good, good, record])
    with pytest.raises(InputError, match=rf"pairs.jsonl:3: .*{problem}"):
        Documents([path], base, 100, encode_pair, per_record=2)


def test_a_pair_without_a_trained_token_on_either_side_is_left_out_whole(base, tmp_path, capsys):
    """Truncation that swallows both answers drops the pair; identical answers stay, counted."""
    long = message("user", "word " * 60)
    records = [
        pair([message("user", "a")], "b", "c"),
        pair([long], "never seen", "nor this"),
        pair([message("user", "a")], "same", "same"),
        pair([message("user", "a")], "b", "x " * 90),
    ]
    path = write(tmp_path / "pairs.jsonl", records)
    documents = Documents([path], base, 40, encode_pair, per_record=2)
    assert documents.record_numbers.tolist() == [1, 1, 3, 3, 4, 4]
    assert (documents.records, documents.skipped, documents.truncated) == (3, 1, 2)
    assert (documents.trained_counts > 0).all() and documents.lengths.max() == 40
    assert dpo.identical_answers(documents) == 1
    assert documents.summary().startswith("3 pairs")


# ---- Log-probabilities


def loaded(folder):
    """Our model with a folder's weights, as the loop has it (one rank)."""
    _, _, device = start()
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_folder(folder))
    shard(model, device, torch.float32)
    from checkpoint import load_hf

    load_hf(model, folder)
    return model, device


def their_logps(model, documents, pairs):
    """(n, 2) from transformers' logits, one document at a time, differentiable."""
    rows = []
    for i in pairs:
        row = []
        for ids, trained in (documents[2 * i], documents[2 * i + 1]):
            ids = torch.tensor(np.array(ids)).long()
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
            picked = logps.gather(1, ids[1:, None])[:, 0]
            row.append(picked[torch.tensor(np.array(trained))[1:]].sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_packed_answers_have_transformers_log_probabilities(base, preferences):
    """All pairs in one row give what transformers gives document by document."""
    model, device = loaded(base)
    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pairs = np.array([3, 0, 18, 7])
    with torch.no_grad():
        ours = answer_logps(model, documents, pairs, device)
        # Sums of up to some hundred fp32 terms of about 6.
        torch.testing.assert_close(
            ours, their_logps(theirs, documents, pairs), rtol=1e-5, atol=1e-3
        )
        assert answer_logps(model, documents, pairs[:0], device).shape == (0, 2)


def test_reference_is_kept_continued_and_moves_no_random_state(
    base, preferences, tmp_path, monkeypatch
):
    """A second call runs no model; a file cut short is completed; other weights make another."""
    model, device = loaded(base)
    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    config = dpo.DPOConfig(model=str(base), out=str(tmp_path), dtype="float32", micro_tokens=1000)
    state = torch.random.get_rng_state()
    first = reference_logps(model, documents, config, device)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.shape == (19, 2) and first.isfinite().all()
    (kept,) = preferences.parent.glob("*.reference-*.npy")

    monkeypatch.setattr("logps.answer_logps", None)  # would fail if called
    assert torch.equal(reference_logps(model, documents, config, device), first)
    monkeypatch.undo()

    half = np.load(kept)
    half[7:] = np.nan
    np.save(kept, half)
    assert torch.equal(reference_logps(model, documents, config, device), first)
    kept.write_bytes(kept.read_bytes()[:50])
    assert torch.equal(reference_logps(model, documents, config, device), first)
    kept.unlink()


def test_a_wrong_reference_stops_the_first_update():
    """Only ln 2 will do: within 1e-3 in fp32, within rounding in bf16."""
    config = dpo.DPOConfig(dtype="float32")
    dpo.check_first_loss(0, math.log(2) + 1e-5, config)
    dpo.check_first_loss(5, 0.4, config)
    with pytest.raises(RunError, match="first loss is 0.7000, expected ln 2"):
        dpo.check_first_loss(0, 0.7, config)


def test_a_batch_equals_trls(base, preferences, tmp_path):
    """Loss, rewards, margins, accuracies and log-probabilities of DPOTrainer, where it is there.

    On the same tokens, with its own reference, after the same change to both models' weights.
    """
    pytest.importorskip("trl")
    from benchmarks.dpo import DPOBenchConfig, trl_trainer

    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    config = dpo.DPOConfig(model=str(base), out=str(tmp_path), dtype="float32", micro_tokens=1000)
    model, device = loaded(base)
    pairs = np.array([3, 0, 18, 7])
    reference = reference_logps(model, documents, config, device)[pairs]
    bench = DPOBenchConfig(max_seq_len=200, batch_size=4, beta=0.2)
    trainer = trl_trainer(bench, base, documents, pairs.tolist(), output_dir=str(tmp_path))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.load_state_dict(trainer.model.state_dict())
        logps = answer_logps(model, documents, pairs, device)
    loss, chosen, rejected = dpo.dpo_loss(*logps.T, *reference.to(logps).T, bench.beta)
    means = dpo.metric_sums(loss, chosen, rejected, logps) / len(pairs)
    assert (chosen - rejected).abs().min() > 1e-2  # far from ln 2, and of a sure sign

    trainer.model.train()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    for name, value in zip(dpo.METRICS, means.tolist(), strict=True):
        # Log-probabilities of some hundreds carry fp32 errors of 1e-4, which beta multiplies.
        assert trainer.batches[0][name] == pytest.approx(value, rel=1e-5, abs=1e-4), name


# ---- The program


def test_three_updates_on_two_ranks_equal_a_plain_transformers_loop(base, preferences, tmp_path):
    """Losses, rewards, margins, accuracies, gradient norms and final weights."""
    flags = ["--model", base, "--data", preferences, "--out", tmp_path, "--batch-size", 5]
    flags += ["--epochs", 2, "--max-steps", 3, "--lr", 1e-3, "--warmup-ratio", 0.1, "--clip", 0.5]
    run_dpo(*flags, "--beta", 0.2, "--micro-tokens", 900, "--max-seq-len", 200, ranks=2)

    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        reference = their_logps(model, documents, range(19))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    for step, record in enumerate(updates(tmp_path)):
        _, pairs = update_members(19, 5, seed=42, step=step)
        logps = their_logps(model, documents, pairs)
        chosen, rejected = (0.2 * (logps - reference[pairs])).T
        loss = torch.log1p(torch.exp(rejected - chosen)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 6, 1e-3, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        # Log-probabilities of some hundreds carry fp32 errors of 1e-4, which beta multiplies.
        for name, value in {
            "loss": loss,
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": logps[:, 0].mean(),
            "logps/rejected": logps[:, 1].mean(),
            "grad_norm": norm,
        }.items():
            assert record[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name
        margins = chosen - rejected
        if step and margins.abs().min() > 1e-3:  # before that, rounding decides the sign
            assert record["rewards/accuracies"] == (margins > 0).float().mean()
    assert len(updates(tmp_path)) == 3
    assert updates(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    saved = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        # bf16 keeps 8 bits; where a gradient is rounding noise, Adam moves by part of the rate.
        torch.testing.assert_close(saved[name].float(), parameter.data, rtol=2**-7, atol=4e-4)


def test_resume_is_bit_for_bit(base, preferences, tmp_path):
    """Stopped by a signal after some updates and started again: the weights of one run."""
    flags = ["--model", base, "--data", preferences, "--batch-size", 4, "--epochs", 8]
    flags += ["--lr", 1e-3, "--out"]
    run_dpo(*flags, tmp_path / "whole")
    command = [sys.executable, "dpo.py", *map(str, flags), str(tmp_path / "cut")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count('"step"') >= 3):
        pass
    process.terminate()
    assert process.wait() == 143
    run_dpo(*flags, tmp_path / "cut")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [r["step"] for r in updates(tmp_path / "cut")] == list(range(1, 33))
