"""plan.py: what it prints and writes, what it refuses, and that its advice holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import plan
from program.errors import InputError
from program.flags import parse_args
from tokens.documents import Documents
from tokens.records import encode_conversation
from training.held_out import drawn

ROOT = Path(plan.__file__).parent
QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
KEYS = {"weights", "gradients", "moments", "gathered", "activations", "loss", "other", "total"}


@pytest.fixture
def planned(tmp_path, capsys):
    """`planned(command line)`: whether it fits, the JSON file, and what was printed."""

    def run(*arguments):
        out = tmp_path / "plan.json"
        fits = plan.main(parse_args(plan.PlanConfig, [*map(str, arguments), "--out", str(out)]))
        return fits, json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_seventy_billion_on_sixty_four_gpus(planned):
    """Both stages at the paper's settings, figures that belong together, and each in the text."""
    fits, record, text = planned("--model", "70b", "--gpus", 64, "--gpu", "h100", "--price", 3)
    assert fits and record["fits"]
    assert [stage["updates"] for stage in record["stages"].values()] == [5096, 5808]
    for stage in record["stages"].values():
        gib = stage["gib"]
        assert gib.keys() == KEYS
        assert gib["total"] == pytest.approx(sum(gib.values()) - gib["total"])
        assert gib["total"] <= stage["gib_available"] < 80
        assert 0 < stage["recompute"] <= 80
        seconds, gpus = stage["seconds_per_update"], stage["gpus"]
        assert seconds == pytest.approx(sum(stage["seconds_by_part"].values()))
        speed = stage["tokens_per_update"] / seconds / gpus
        assert stage["tokens_per_second_per_gpu"] == pytest.approx(speed)
        assert 0 < stage["mfu"] < 0.8
        assert stage["gpu_hours"] == pytest.approx(64 * stage["hours"])
        assert f"{3 * stage['gpu_hours']:,.0f} at 3 a GPU hour" in text
        assert f"--recompute {stage['recompute']}" in text
    hours = record["updates"] * record["seconds_per_update"] / 3600
    assert record["hours"] == pytest.approx(hours) and record["stage"] == "sft"
    assert record["stages"]["dpo"]["hours"] > 5808 * seconds / 3600  # the reference, too
    assert "exchange that does not hide" in text


def test_choosing_data_costs_one_forward_pass_of_all_by_rds_and_nine_by_less(planned):
    """rds: 2 FLOPs a weight, 6.48e9 weights and 3.58e8 tokens, at 396 TFLOP/s 3.25 hours, and
    attention. (Published: 3.3 H100 hours.) less: two such passes, of 4.2 times as many tokens, and
    a tenth for adapters and projection: 31.8 hours."""
    _, _, text = planned("--model", "7b", "--gpus", 8, "--gpu", "h100", "--stage", "sft")
    assert "choosing among them first (prune.py): rds 3.4 GPU hours, less 31.8" in text


def test_the_bar_is_the_table(planned):
    """Each item has its share of the characters, within one; dots are what is free."""
    _, record, text = planned("--model", "7b", "--gpus", 64, "--stage", "sft", "--recompute", 32)
    line = next(line for line in text.splitlines() if line.startswith("  ["))
    filled = line.strip()[1:-1]
    letters = dict(zip("WGMgalo", plan_items(record), strict=True))
    for letter, gib in letters.items():
        assert abs(filled.count(letter) - 60 * gib / record["gib_available"]) <= 1
    assert filled.count(".") > 0 and len(filled) == 60


def plan_items(record):
    names = ("weights", "gradients", "moments", "gathered", "activations", "loss", "other")
    return [record["gib"][name] for name in names]


def test_what_does_not_fit_says_what_would(planned):
    """Each change that is proposed, given as the flags that it names, fits."""
    command = ["--model", "34b", "--gpus", 8, "--gpu", "h100", "--stage", "sft"]
    fits, record, text = planned(*command)
    assert not fits and not record["fits"] and record["hours"] is None
    assert record["gib"]["total"] > record["gib_available"]
    assert len(record["would_fit"]) > 1 and "does NOT fit" in text
    for change in record["would_fit"]:
        assert change in text
        ranks = change.split()[0] if change.endswith("GPUs") else 8
        flags = [] if change.endswith("GPUs") else change.split()
        assert planned(*command, *flags, "--gpus", ranks)[0], change


def test_own_data(planned, base, conversations, preferences, tmp_path):
    """Lengths are those of the data, the stage is what the records are, --max-steps ends it."""
    fits, record, _ = planned("--model", base, "--data", conversations, "--gpu", "4090")
    documents = Documents([conversations], base, 8192, encode_conversation, tmp_path)
    assert fits and record["stage"] == "sft" and list(record["stages"]) == ["sft"]
    assert record["row_tokens"] <= documents.lengths.sum() * 1.1
    update_of_all = min(128, len(documents)) == len(documents)
    if update_of_all:
        assert record["tokens_per_update"] == documents.lengths.sum()
    _, shorter, _ = planned("--model", base, "--data", conversations, "--max-steps", 1)
    assert shorter["updates"] == 1 and record["updates"] > 1
    assert planned("--model", base, "--data", preferences)[1]["stage"] == "dpo"
    some = ("--model", base, "--data", conversations, "--max-seq-len", 60)
    with pytest.raises(InputError, match="expected at most 60"):
        planned(*some, "--too-long", "error")


def test_the_held_out_share_is_not_trained(planned, base, conversations, tmp_path):
    """One conversation an update: as many updates as the loops hold none out of; of the paper's
    data, too."""
    command = ["--model", base, "--data", conversations, "--batch-size", 1, "--epochs", 1]
    _, record, _ = planned(*command, "--eval-share", 0.4)
    documents = Documents([conversations], base, 8192, encode_conversation, tmp_path)
    stay = int((~drawn(documents, 42, 0.4)).sum())
    assert record["updates"] == stay < len(documents)
    command = ["--model", "7b", "--gpus", 8, "--stage", "dpo"]
    assert planned(*command, "--eval-share", 0.5)[1]["updates"] == 3 * (61_966 // 2 // 32)


def test_recomputed_as_the_loops_do(planned):
    """As few blocks as leave a twentieth of the memory free, not fewer."""
    command = ["--model", "13b", "--gpus", 8, "--stage", "sft"]
    _, record, _ = planned(*command)
    free = 0.95 * record["gib_available"]
    assert record["gib"]["total"] <= free and record["recompute"] > 0
    _, fewer, _ = planned(*command, "--recompute", record["recompute"] - 1)
    assert fewer["fits"] and fewer["gib"]["total"] > free


def test_a_folder_in_nf4_is_planned_as_the_loops_take_it(planned, base, tmp_path):
    """With --quantize nf4; without, it is refused as they refuse it."""
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = QUANTIZATION
    (tmp_path / "config.json").write_text(json.dumps(values))
    command = ("--model", tmp_path, "--stage", "sft")
    assert planned(*command, "--lora-rank", 4, "--quantize", "nf4")[0]
    with pytest.raises(InputError, match="quantization_config"):
        planned(*command)


def test_flags_of_the_loops_change_what_they_change(planned):
    """Recomputation costs time and saves memory; adapters save more; the rate changes nothing."""
    command = ["--model", "7b", "--gpus", 8, "--stage", "sft"]
    records = {
        name: planned(*command, *flags.split())[1]
        for name, flags in {
            "none": "--recompute 0 --micro-tokens 8192",
            "all": "--recompute 32 --micro-tokens 8192",
            "rate": "--recompute 32 --micro-tokens 8192 --lr 1e-3 --save-every 5",
            "adapters": "--recompute 32 --micro-tokens 8192 --lora-rank 64 --quantize nf4",
        }.items()
    }
    assert records["none"]["seconds_per_update"] < records["all"]["seconds_per_update"]
    assert records["none"]["gib"]["total"] > records["all"]["gib"]["total"]
    assert records["adapters"]["gib"]["total"] < records["all"]["gib"]["total"] / 2
    assert records["rate"]["seconds_per_update"] == records["all"]["seconds_per_update"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 8", "--model is missing"),
        ("--model 9b", "--model is 9b, expected a folder or one of 7b, 13b, 34b, 70b"),
        ("--model 7b --gpu h300", "--gpu is h300, expected one of h100"),
        ("--model 7b --gpus 0", "--gpus is 0, expected an integer from 1 up"),
        ("--model 7b --gpus 8 --replicas 3", "--replicas is 3, expected a divisor of the 8"),
        ("--model 7b --recompute 33", "--recompute is 33, expected 0 to 32"),
        ("--model 7b --recompute -1", "--recompute is -1, expected"),
        ("--model 7b --replicas 0", "--replicas is 0, expected"),
        ("--model 7b --stage ppo", "--stage is ppo, expected sft or dpo"),
        ("--model 7b --quantize nf4", "--quantize needs --lora-rank"),
        ("--model 7b --lora-rank 8 --quantize int8", "--quantize is int8, expected nf4"),
        ("--model 7b --price -1", "--price is -1.0, expected a number from 0 up"),
        ("--model 7b --data x.jsonl", "--data needs a tokenizer, --model is 7b"),
        ("--model 7b --micro-tokens 4096", "--micro-tokens is 4096, expected at least"),
        ("--model 7b --out nowhere/plan.json", "nowhere/plan.json: no such folder"),
    ],
)
def test_bad_flags(flags, message):
    """One error that names the flag, what was found and what was expected."""
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        plan.main(parse_args(plan.PlanConfig, flags.split()))


@pytest.mark.parametrize(
    ("flags", "status", "error"),
    [
        ("--model 7b --gpus 8 --stage dpo", 0, ""),
        ("--model 70b --gpus 1 --stage dpo", 1, ""),
        ("--model 7b --gpu abacus", 2, "error: --gpu is abacus"),
    ],
)
def test_exit_status(flags, status, error):
    """0 where it fits, 1 where it does not, 2 and one line for a bad flag."""
    command = [sys.executable, "plan.py", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == status
    assert done.stderr.startswith(error) and len(done.stderr.splitlines()) == bool(error)


def test_help_explains_every_flag(capsys):
    """Also those that are taken from the loops and change nothing."""
    with pytest.raises(SystemExit):
        parse_args(plan.PlanConfig, ["--help"])
    text = capsys.readouterr().out
    assert "--micro-tokens" in text and "change neither memory nor time" in text
