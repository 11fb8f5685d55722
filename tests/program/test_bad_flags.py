"""Flags and output folders that will not do: one line that names both, and nothing is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import data
import sft
from checkpoint import run_folder
from program.errors import InputError
from program.flags import parse_args


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
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: full)
    assert "0.0 GB free, expected 0.0 GB for the model" in refused()
    # The bf16 model takes 2 bytes a parameter, a resumable checkpoint with its fp32 weights and
    # moments 12 more.
    parameters = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    enough, checkpoints = full._replace(free=2 * parameters), {"save_every": 1}
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: enough)
    model = torch.nn.ParameterList([torch.zeros(parameters)])
    run_folder.check_output(tmp_path / "out", {}, model, save_every=0)
    assert "GB free, expected 0.0 GB for the model and one" in refused(**checkpoints)
    enough = full._replace(free=14 * parameters - 1)
    assert "GB free, expected 0.0 GB for the model and one" in refused(**checkpoints)
    enough = full._replace(free=14 * parameters)
    run_folder.check_output(tmp_path / "out", {}, model, save_every=1)


def test_output_folder_of_another_run(refused, conversations, tmp_path):
    """Going on with another flag, other data or another model is refused, and says which."""
    other = tmp_path / "other"
    sft_flags = {"batch_size": 8, "max_steps": 1, "save_every": 1}
    other.mkdir()
    facts = {"program": "SFTConfig", "model": "elsewhere"}
    (other / "metrics.jsonl").write_text(json.dumps({"event": "start", "run": facts}) + "\n")
    message = refused(out=str(other), **sft_flags)
    assert "holds a different run, with model 'elsewhere' where this one has" in message
    for content in ("[]\n", "5\n", '{"run": 5}\n', '{"event": "start"}\n', "\xff\xfe\n"):
        (other / "metrics.jsonl").write_text(content, encoding="latin-1")
        assert f"--out {other}: holds " in refused(out=str(other), **sft_flags)
