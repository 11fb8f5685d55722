"""dpo.py: pairs, loss and reference alone, and the program against a plain transformers loop."""

import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dpo
from checkpoint.resume import saved_runs
from checkpoint.weights import weights_key
from conftest import run_program, updates
from data import update_members
from harm import FSYNC, REPLACE, assert_same_run, flip_byte, harmed, recipe
from pairs import loaded, message, pair, their_logps, write
from program.errors import InputError, RunError
from program.flags import run_facts
from tokens.documents import Documents
from tokens.records import encode_pair
from tokens.tokenizer import Tokenizer
from training.reference import answer_logps, reference_logps
from training.update import learning_rate

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


def test_metrics_are_of_each_pair_and_a_tie_is_not_right():
    """Three pairs, of the margins 2, 0 and -3: one ranking is right."""
    policy_chosen, policy_rejected = torch.tensor([[-4.0, -6.0], [-5.0, -8.0], [-7.0, -2.0]]).T
    chosen, rejected = torch.tensor([[1.0, -1.0], [2.0, 2.0], [-1.0, 2.0]]).T
    loss = torch.tensor([0.5, 1.0, 4.0])
    metrics = dpo.pair_metrics(loss, chosen, rejected, policy_chosen, policy_rejected)
    assert {name: values.tolist() for name, values in metrics.items()} == {
        "loss": [0.5, 1, 4],
        "rewards/chosen": [1, 2, -1],
        "rewards/rejected": [-1, 2, 2],
        "rewards/margins": [2, 0, -3],
        "rewards/accuracies": [True, False, False],
        "logps/chosen": [-4, -5, -7],
        "logps/rejected": [-6, -8, -2],
    }


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
        (
            {
                "chosen": [message("system", "a"), message("assistant", "b")],
                "rejected": [message("user", "a"), message("assistant", "b")],
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


def test_prompts_that_differ_in_outer_white_space_are_one(base):
    """The chat format strips every message, so the token ids of both prompts are the same."""
    tokenizer = Tokenizer(base)
    record = pair([message("user", "a b")], "c", "d")
    odd = record | {"rejected": [message("user", "\n a b  "), message("assistant", "d")]}
    assert encode_pair(odd, tokenizer) == encode_pair(record, tokenizer)


def test_a_pair_without_a_trained_token_on_either_side_is_left_out_whole(base, tmp_path, capsys):
    """Truncation that swallows both answers drops the pair; identical answers stay."""
    long = message("user", "word " * 60)
    records = [
        pair([message("user", "a")], "b", "c"),
        pair([long], "never seen", "nor this"),
        pair([message("user", "a")], "same", "same"),
        pair([message("user", "a")], "b", "x " * 90),
    ]
    path = write(tmp_path / "pairs.jsonl", records)
    documents = Documents([path], base, 40, encode_pair, per_record=2)
    assert documents.numbers.tolist() == [[1, 1], [3, 3], [4, 4]]
    assert (len(documents), documents.skipped, documents.truncated) == (3, 1, 2)
    assert (documents.trained_counts > 0).all() and documents.lengths.max() == 40
    assert documents.summary().startswith("3 pairs")


# ---- The first update, and TRL


def test_a_wrong_reference_stops_the_first_update():
    """Only ln 2 will do: within 1e-3 in fp32, within rounding in bf16, both for a beta of 0.1."""
    config = dpo.DPOConfig(dtype="float32")
    dpo.check_first_loss(0, math.log(2) + 4e-2, dpo.DPOConfig(dtype="bfloat16"))
    dpo.check_first_loss(0, math.log(2) + 4e-2, dpo.DPOConfig(dtype="float32", beta=5.0))
    dpo.check_first_loss(0, math.log(2) + 1e-5, config)
    dpo.check_first_loss(5, 0.4, config)
    for loss in (0.7, 0.68):  # above ln 2 and below
        with pytest.raises(RunError, match=f"first loss is {loss:.4f}, expected ln 2"):
            dpo.check_first_loss(0, loss, config)


def test_a_batch_equals_trls(base, preferences, tmp_path):
    """Loss, rewards, margins, accuracies and log-probabilities of DPOTrainer, where it is there.

    On the same tokens, with its own reference, after the same change to both models' weights.
    """
    pytest.importorskip("trl")
    from benchmarks.trl_trainer import trl_trainer

    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    config = dpo.DPOConfig(
        model=str(base), out=str(tmp_path), dtype="float32", micro_tokens=1000,
        max_seq_len=200, batch_size=4, beta=0.2,
    )  # fmt: skip
    model, device = loaded(base)
    pairs = np.array([3, 0, 18, 7])
    reference = reference_logps(model, documents, config, weights_key(base), device)[pairs]
    trainer = trl_trainer(config, documents, pairs.tolist())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.load_state_dict(trainer.model.state_dict())
        logps = answer_logps(model, documents, pairs, device)
    loss, chosen, rejected = dpo.dpo_loss(*logps.T, *reference.to(logps).T, config.beta)
    metrics = dpo.pair_metrics(loss, chosen, rejected, *logps.T)
    assert (chosen - rejected).abs().min() > 1e-2  # far from ln 2, and of a sure sign

    trainer.model.train()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    for name, values in metrics.items():
        # Log-probabilities of some hundreds carry fp32 errors of 1e-4, which beta multiplies.
        mean = values.double().mean().item()
        assert trainer.batches[0][name] == pytest.approx(mean, rel=1e-5, abs=1e-4), name


# ---- The program


DESIGN_DEFAULTS = {
    "model": None, "data": None, "out": "runs/dpo", "epochs": 3, "batch_size": 32,
    "max_seq_len": 8192, "lr": 5e-7, "warmup_ratio": 0.1, "weight_decay": 0, "beta1": 0.9,
    "beta2": 0.95, "clip": 1.0, "beta": 0.1, "micro_tokens": 16384, "max_steps": 0,
    "save_every": 0, "keep": 2, "keep_checkpoints": False, "seed": 42, "dtype": None,
    "recompute": None, "replicas": 1, "compile": None, "too_long": "cut", "eval_data": None,
    "eval_share": 0, "eval_every": 0, "export_every": None, "keep_exports": 0,
    "export_merged": False, "tensorboard": False, "wandb": False, "lora_rank": 0, "lora_alpha": 16,
    "lora_dropout": 0.1,
    "quantize": None,
}  # fmt: skip


def test_defaults_are_tulu_2_dpos():
    """Exactly the flags and defaults of the design's table."""
    assert vars(dpo.DPOConfig()) == DESIGN_DEFAULTS


def test_a_run_with_another_beta_is_another_run():
    """beta changes the weights, so such a run is not continued."""
    runs = [run_facts(dpo.DPOConfig(model="m", beta=beta)) for beta in (0.1, 0.2)]
    assert runs[0] != runs[1]


def test_three_updates_on_two_ranks_equal_a_plain_transformers_loop(base, preferences, tmp_path):
    """Every figure in the log and the final weights.

    Under a clip as small as AdamW's eps, as in test_sft.py, and a decay that shows.
    """
    flags = ["--model", base, "--data", preferences, "--out", tmp_path, "--batch-size", 5]
    flags += ["--epochs", 2, "--max-steps", 3, "--lr", 0.1, "--warmup-ratio", 0.1, "--clip", 1e-6]
    flags += ["--weight-decay", 1, "--beta", 0.2, "--micro-tokens", 900, "--max-seq-len", 200]
    run_program("dpo.py", *flags, ranks=2)

    documents = Documents([preferences], base, 200, encode_pair, per_record=2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        reference = their_logps(model, documents, range(19))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=1)
    for step, record in enumerate(updates(tmp_path)):
        epoch, pairs = update_members(19, 5, seed=42, step=step)
        logps = their_logps(model, documents, pairs)
        chosen, rejected = (0.2 * (logps - reference[pairs])).T
        loss = torch.log1p(torch.exp(rejected - chosen)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 6, 0.1, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert (record["step"], record["epoch"]) == (step + 1, epoch + 1)
        assert record["lr"] == learning_rate(step, 6, 0.1, 0.1)
        both = documents.sequences(pairs)
        prompts = [list(trained).index(True) for _, trained in both[1::2]]  # once in the row
        assert record["tokens"] == sum(len(ids) for ids, _ in both) - sum(prompts)
        assert record["trained_tokens"] == sum(int(trained.sum()) for _, trained in both)
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
        # Rounding to bf16, which keeps 8 bits, and fp32's own: some 1e-8.
        torch.testing.assert_close(saved[name].float(), parameter.data, rtol=2**-8, atol=1e-6)


def test_fewer_pairs_than_a_batch_are_an_update_of_themselves(base, preferences, tmp_path):
    """19 pairs in a batch of 32 or of 19: the same means, gradient norms and weights."""
    flags = {"model": str(base), "data": [str(preferences)], "epochs": 2, "lr": 1e-3}
    for name, batch_size in (("more", 32), ("exact", 19)):
        dpo.main(flags | {"out": str(tmp_path / name), "batch_size": batch_size})
    more, exact = updates(tmp_path / "more"), updates(tmp_path / "exact")
    for a, b in zip(more, exact, strict=True):
        timing = {"seconds", "tokens_per_second", "pairs_per_second", "peak_memory_gib"}
        assert a.keys() == b.keys() and all(a[name] == b[name] for name in a.keys() - timing)
    assert [record["step"] for record in more] == [1, 2]
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("more", "exact")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_bf16_trains_as_fp32_does_on_one_rank_and_on_two(base, preferences, tmp_path):
    """ln 2 first, then the same losses, rewards and log-probabilities but for bf16's rounding."""
    found = {}
    for dtype, ranks in (("float32", 1), ("bfloat16", 1), ("bfloat16", 2)):
        out = tmp_path / f"{dtype}-{ranks}"
        flags = {"model": str(base), "data": [str(preferences)], "out": str(out), "dtype": dtype}
        flags |= {"batch_size": 6, "lr": 1e-3, "warmup_ratio": 0, "max_steps": 3}
        assert harmed(flags | {"micro_tokens": 900}, ranks=ranks, program="dpo") == 0
        found[out.name] = updates(out)
    exact = found.pop("float32-1")
    for records in found.values():
        assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        for side in ("chosen", "rejected"):
            # A reference in fp32 would be off by 2e-2 in the mean; times beta, 2e-3.
            assert records[0][f"rewards/{side}"] == pytest.approx(0, abs=5e-4)
        for a, b in zip(exact, records, strict=True):
            # bf16 rounds to within 2^-9; over the tokens of some answers most of it averages out.
            for name in ("logps/chosen", "logps/rejected"):
                assert a[name] != b[name] == pytest.approx(a[name], rel=2**-11), name
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2**-6)
            # beta times what is left in log-probabilities of some hundreds
            for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
                assert b[name] == pytest.approx(a[name], abs=5e-3), name


# ---- Runs that come to harm; sft.py's are in test_crash.py, and most code is the same

LOG = ("dpo", "append_record")


@pytest.fixture
def flags(base, preferences, tmp_path):
    """Of a run of 12 updates on pairs of its own."""
    data = shutil.copy(preferences, tmp_path / "pairs.jsonl")
    return recipe(base, data, tmp_path / "out") | {"batch_size": 4, "epochs": 3, "lr": 1e-3}


def test_killed_again_and_again(flags, tmp_path):
    """kill -9 while the reference is written, trained and saved: the weights of one run, bit for
    bit, every step once, and nothing half made beside the data."""
    whole = flags | {"out": str(tmp_path / "whole")}
    assert harmed(whole, program="dpo") == 0
    next(tmp_path.glob("*.reference-*")).unlink()
    flags |= {"save_every": 2, "keep_checkpoints": True}
    for calls, at in (
        ([REPLACE], 1),  # when the reference is whole but for its name
        ([REPLACE], 2),  # when it is there, and the log not yet
        ([LOG], 4),  # with a checkpoint of update 2
        ([FSYNC], 4),  # in the next one
        ([LOG], 3),
        ([REPLACE], 4),  # when the model moves in
    ):
        status = harmed(flags, signal.SIGKILL, at, calls, program="dpo")
        assert status == -signal.SIGKILL, (calls, at)
    assert harmed(flags, program="dpo") == 0
    assert_same_run(flags["out"], whole["out"])
    # After the last update, 12, there is the model: no checkpoint needs to be made.
    assert [place.name for place in saved_runs(flags["out"])] == ["step-000010", "step-000008"]
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob("*.lock")]


def test_stopped_ranks_go_on_without_the_kept_reference(flags, tmp_path):
    """It is then made again, from the model's folder, before the checkpoint is loaded."""
    whole = flags | {"out": str(tmp_path / "whole")}
    assert harmed(whole, ranks=2, program="dpo") == 0
    assert harmed(flags, signal.SIGTERM, 3, [LOG], ranks=2, program="dpo") == 143
    next(tmp_path.glob("*.reference-*")).unlink()
    assert harmed(flags, ranks=2, program="dpo") == 0
    assert_same_run(flags["out"], whole["out"])


def test_a_run_of_another_model_is_not_continued(flags, tmp_path):
    """A folder of the same name with other weights would be another reference."""
    model, log = Path(shutil.copytree(flags["model"], tmp_path / "model")), tmp_path / "log"
    flags |= {"model": str(model)}
    assert harmed(flags, signal.SIGTERM, 3, [LOG], program="dpo") == 143
    flip_byte(model / "model.safetensors")
    assert harmed(flags, log=log, program="dpo") == 2
    assert f"error: --out {flags['out']}: holds a different run, with weights " in log.read_text()


def test_a_pair_stays_in_one_row(flags, base):
    """--micro-tokens must hold both answers of the longest pair; the error names what would."""
    with pytest.raises(InputError, match="--micro-tokens is 150, expected at least ") as caught:
        dpo.main(flags | {"micro_tokens": 150})
    enough = int(str(caught.value).split("at least ")[1].split(",")[0])
    documents = Documents(flags["data"], base, 8192, encode_pair, per_record=2)
    lengths = documents.tokens
    assert enough == max(lengths)
    assert f"pairs.jsonl:{lengths.argmax() + 1} (id p{lengths.argmax()})" in str(caught.value)
    dpo.main(flags | {"micro_tokens": enough, "max_steps": 1})
