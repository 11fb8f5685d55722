"""Flags and output folders that will not do: one line that names both, and nothing is written."""

import dataclasses
import json
import random
import shutil

import pytest
from safetensors.torch import load_file

import data
import dpo
import sft
from checkpoint import disk, run_folder
from evaluate import EvalConfig
from generate import GenerateConfig
from program.errors import InputError
from program.flags import check_bounds, parse_args, run_facts
from tokens.records import encode_conversation
from training import setup


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--epochs 0", "--epochs is 0, expected an integer from 1 up"),
        ("--batch-size -1", "--batch-size is -1, expected an integer from 1 up"),
        ("--max-seq-len 1", "--max-seq-len is 1, expected an integer from 2 up"),
        ("--lr 0", "--lr is 0.0, expected a number from 0 up, 0 excluded"),
        ("--lr -1", "--lr is -1.0"),
        ("--lr nan", "--lr is nan, expected a number"),
        ("--lr inf", "--lr is inf, expected a number"),
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--warmup-ratio 1.5", "--warmup-ratio is 1.5, expected a number from 0 to 1"),
        ("--warmup-ratio -0.1", "--warmup-ratio is -0.1"),
        ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--beta1 1", "--beta1 is 1.0, expected a number from 0 to 1, 1 excluded"),
        ("--beta2 nan", "--beta2 is nan"),
        ("--clip -1", "--clip is -1.0"),
        ("--clip nan", "--clip is nan"),
        ("--micro-tokens 0", "--micro-tokens is 0, expected an integer from 2 up"),
        ("--max-steps -1", "--max-steps is -1"),
        ("--save-every -1", "--save-every is -1"),
        ("--keep 0", "--keep is 0, expected an integer from 1 up"),
        ("--seed -1", "--seed is -1"),
        ("--epochs 1.5", "--epochs: invalid int value: '1.5'"),
        ("--dtype float16", "--dtype is float16, expected bfloat16 or float32"),
        ("--dtype", "--dtype: expected one argument"),
        ("--data", "--data: expected at least one argument"),
        ("--learning-rate 1", "unrecognized arguments: --learning-rate 1 (--help lists the flags)"),
        ("--epoch 1", "unrecognized arguments: --epoch 1"),
    ],
)
def test_bad_flag(refused, base, conversations, line, expected):
    """A flag that is unknown, has no value or one that makes no sense, is named with both."""
    given = ["--model", str(base), "--data", str(conversations), *line.split()]
    try:
        flags = parse_args(sft.SFTConfig, given)
    except InputError as error:
        assert expected in str(error)
    else:
        del flags["model"], flags["data"]
        assert expected in refused(**flags)


def test_flags_that_do_not_fit_the_data(refused, conversations):
    """Rows too small for the longest conversation name a number that works; so the length does."""
    message = refused(micro_tokens=50)
    assert "--micro-tokens is 50, expected at least " in message
    enough = int(message.split("at least ")[1].split(",")[0])
    assert f"{conversations}:" in message and "(id made-up-" in message
    assert f"--micro-tokens is {enough - 1}, expected at" in refused(micro_tokens=enough - 1)
    assert "has a trained token in its first 2 tokens" in refused(max_seq_len=2)


@pytest.mark.parametrize("given", [["--model", ""], ["--out="], ["--data", "a.jsonl", ""]], ids=str)
def test_an_empty_path(given):
    """What a shell makes of a variable that is not set does not mean the current folder."""
    with pytest.raises(InputError, match=rf"{given[0].strip('=')}: expected a value"):
        parse_args(sft.SFTConfig, given)
    assert parse_args(GenerateConfig, ["--system", ""]) == {"system": ""}


@pytest.mark.parametrize("given", ["model", "data"])
def test_model_without_data(given, tmp_path, monkeypatch):
    """--model and --data go together; one alone does not start the demo."""
    monkeypatch.chdir(tmp_path)
    value = {"model": "somewhere", "data": ["some.jsonl"]}[given]
    with pytest.raises(InputError, match="--model and --data go together"):
        sft.main({given: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--batch-size 0", "--batch-size is 0, expected"),
        ("--max-seq-len -5", "--max-seq-len is -5, expected"),
        ("--micro-tokens 50", "--micro-tokens is 50, expected at least"),
        ("--show -1", "--show is -1, expected"),
        ("--seed -1", "--seed is -1, expected"),
    ],
)
def test_bad_flag_of_data(base, conversations, line, expected):
    """`python data.py` checks its flags as training does."""
    given = ["--model", str(base), "--data", str(conversations), *line.split()]
    with pytest.raises(InputError, match=expected):
        data.main(parse_args(data.DataConfig, given))


def test_any_flags_are_taken_or_refused():
    """Random values for random flags of every command: a config, or an `InputError`."""
    rng, refused = random.Random(0), 0
    configs = [sft.SFTConfig, dpo.DPOConfig, GenerateConfig, EvalConfig, data.DataConfig]
    values = ["", "0", "1", "-1", "1e-45", "1e400", "nan", "-inf", "x", "1_000", "٣", " 1", "0x10",
              "9" * 30, "9" * 5000, "--", "-", "\udce9", "%s", "{}", "true", "\0"]  # fmt: skip
    for _ in range(200):
        config_class, line = rng.choice(configs), []
        for field in rng.sample(dataclasses.fields(config_class), rng.choice([1, 1, 2])):
            flag, value = "--" + field.name.replace("_", "-"), rng.choice(values)
            line += rng.choice([[flag, value], [f"{flag}={value}"], [flag], [f"--no-{flag[2:]}"]])
        try:
            config = config_class(**parse_args(config_class, line))
            check_bounds(config)
        except InputError as error:
            refused += bool(str(error))
        else:
            numbers = [v for v in dataclasses.astuple(config) if type(v) in (int, float)]
            assert all(abs(number) < 2**63 for number in numbers), line
    assert 100 < refused < 200  # some are fine


# ---- Output folder


def test_output_folder_that_will_not_do(refused, base, tmp_path, monkeypatch):
    """A file, a model, a finished or other run, a place that cannot be written, a full disk."""
    (tmp_path / "file").write_text("")
    assert "file is not a folder" in refused(out=str(tmp_path / "file"))
    assert "file is not a folder" in refused(out=str(tmp_path / "file" / "below"))
    expected = "holds a finished run or a model (config.json), expected a new folder"
    assert expected in refused(out=str(base))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("")
    assert "a model (model.safetensors)" in refused(out=str(tmp_path / "weights"))
    for name in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / name / name).mkdir(parents=True)
        expected = f"holds {name}, which the saved model's readers would use, expected a new folder"
        assert expected in refused(out=str(tmp_path / name))

    monkeypatch.setattr(run_folder.os, "access", lambda *_: False)
    assert f"{tmp_path} cannot be written" in refused()
    monkeypatch.undo()
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: full)
    assert "0.000 GB free, expected 0.001 GB for the model and one resumable" in refused()


def test_disk_for_what_stands_there_at_once(base, conversations, refused, tmp_path, monkeypatch):
    """The model in bf16, 2 bytes a weight, and checkpoints of 12: one more than stay.

    Of 24 conversations in batches of 8 and one epoch, 3 updates, two can be saved before the last.
    """
    weights = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    usage, run = shutil.disk_usage(tmp_path), {"batch_size": 8, "epochs": 1}
    for flags, checkpoints in (
        ({}, 1),
        ({"save_every": 3}, 1),
        ({"save_every": 2}, 2),
        ({"save_every": 1}, 3),
        ({"save_every": 1, "keep": 9}, 3),
        ({"save_every": 1, "keep": 1}, 2),
        ({"save_every": 1, "max_steps": 2}, 2),
    ):
        less = usage._replace(free=(12 * checkpoints + 2) * weights - 1)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _, less=less: less)
        several = f"{checkpoints} resumable checkpoints" if checkpoints > 1 else "one resumable"
        assert f"GB for the model and {several}" in refused(**run, **flags)
        enough = less._replace(free=less.free + 1)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _, enough=enough: enough)
        with pytest.raises(Reached):
            monkeypatch.setattr(setup, "lock_output", reach)
            sft.main({"model": str(base), "data": [str(conversations)], "out": "x"} | run | flags)


class Reached(Exception):
    """The flags were taken."""


def reach(*args):
    raise Reached


def test_output_folder_of_another_run(refused, base, conversations, tmp_path):
    """Going on with another flag, other data or another model is refused, and says which."""
    other = tmp_path / "other"
    sft_flags = {"batch_size": 8, "max_steps": 1, "save_every": 1}
    other.mkdir()
    facts = {"program": "SFTConfig", "model": "elsewhere"}
    (other / "metrics.jsonl").write_text(json.dumps({"event": "start", "run": facts}) + "\n")
    message = refused(out=str(other), **sft_flags)
    assert "holds a different run, with model 'elsewhere' where this one has" in message
    # Data are compared by their content, so the same file with another line is other data.
    facts = run_facts(sft.SFTConfig(model=str(base), dtype="float32", **sft_flags))
    facts |= {"data": "other"}
    (other / "metrics.jsonl").write_text(json.dumps({"event": "start", "run": facts}) + "\n")
    key = data.Documents([conversations], base, 8192, encode_conversation).key
    message = refused(out=str(other), **sft_flags)
    assert f"a different run, with data 'other' where this one has '{key}'" in message
    for content in ("[]\n", "5\n", '{"run": 5}\n', '{"event": "start"}\n', "\xff\xfe\n"):
        (other / "metrics.jsonl").write_text(content, encoding="latin-1")
        assert f"--out {other}: holds " in refused(out=str(other), **sft_flags)
