"""demo/command.py: when the demo runs, afresh, and its SFT as a user would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo import command, tasks
from demo.command import prepare_dpo, prepare_sft, show_effect, train_sft, wanted
from program.errors import RunError
from program.ranks import die_with_parent, start
from training.flags import DEMO

ROOT = Path(__file__).parent.parent.parent


def test_the_demo_is_for_a_command_without_model_and_data():
    """Other flags change the demo; --model or --data alone is left to `check_flags` to refuse."""
    assert wanted({}) and wanted({"epochs": 1, "out": "elsewhere"})
    assert not wanted({"model": "m"}) and not wanted({"data": ["d"], "epochs": 1})


def test_every_demo_starts_afresh_and_dpo_from_a_finished_sft(tmp_path, monkeypatch):
    """Each removes its own earlier result; DPO keeps SFT's, and has it made where there is none."""
    called = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "make", lambda: called.append("make"))
    monkeypatch.setattr(command, "train_sft", lambda: called.append("train"))
    sft, dpo = (Path(flags["out"]) / "config.json" for flags in (tasks.SFT, tasks.DPO))
    for config in (sft, dpo):
        config.parent.mkdir(parents=True)
        config.write_text("{}")
    assert prepare_dpo({}) == tasks.DPO and called == []
    assert sft.exists() and not dpo.parent.exists()
    assert prepare_sft({}) == tasks.SFT and called == ["make"]
    assert not sft.parent.exists()
    sft.parent.mkdir()  # an interrupted run: without config.json it has no model
    assert prepare_dpo({}) == tasks.DPO and called == ["make", "train"]


@pytest.mark.parametrize("prepare, own", [(prepare_sft, tasks.SFT), (prepare_dpo, tasks.DPO)])
def test_flags_of_the_command_line_come_before_the_demos(prepare, own, tmp_path, monkeypatch):
    """A share takes the place of the demo's held-out file; another folder is not emptied, nor is
    the demo's own for its sake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "make", lambda: None)
    for folder in ("mine", *DEMO.values()):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
    flags = prepare({"eval_share": 0.1, "out": "mine"})
    without = {name: value for name, value in own.items() if name != "eval_data"}
    assert flags == without | {"eval_share": 0.1, "out": "mine"}
    assert all((Path(folder) / "config.json").exists() for folder in ("mine", *DEMO.values()))
    both = {"eval_share": 0.1, "eval_data": ["x"]}  # for `check_flags` to refuse
    assert prepare(both) == own | both and prepare({"eval_share": 0.0}) == own | {"eval_share": 0.0}


def test_with_adapters_the_rates_alone_are_others(tmp_path, monkeypatch):
    """Model, data, output and schedule are the demo's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "make", lambda: None)
    monkeypatch.setattr(command, "train_sft", lambda: None)
    for prepare, plain in ((prepare_sft, tasks.SFT), (prepare_dpo, tasks.DPO)):
        assert prepare({"lora_rank": 0}) == plain | {"lora_rank": 0}
        adapted = prepare({"lora_rank": 16})
        assert adapted == plain | {"lora_rank": 16, "lr": adapted["lr"]}
        assert adapted["lr"] > plain["lr"]
        assert prepare({"lora_rank": 16, "lr": 0.5})["lr"] == 0.5


def test_the_effect_is_that_of_the_run_on_its_base(monkeypatch, capsys):
    """`compare(before, after)` gets the folder that training started from, then its result.

    What to expect of adapters is said where they start from the base that knows nothing.
    """
    start()
    compared = []
    monkeypatch.setattr(command, "compare", lambda *folders: compared.append(folders))
    show_effect({"model": "base", "out": "result", "lr": 1.0})
    assert compared == [("base", "result")]
    for flags in (tasks.SFT, tasks.SFT | {"lora_rank": 0}, tasks.DPO | {"lora_rank": 4}):
        show_effect(flags)
    assert capsys.readouterr().out == ""
    show_effect(tasks.SFT | {"lora_rank": 4})
    assert "a base that knows nothing" in capsys.readouterr().out


@pytest.fixture
def commands(monkeypatch):
    """A list of the commands that `train_sft` starts, each with its options. None of them runs."""
    start()
    started = []

    def run(arguments, **options):
        started.append((arguments, options))
        return subprocess.CompletedProcess(arguments, returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_the_command_is_the_users(commands):
    """`python sft.py` without flags, in the caller's folder; it ends when the caller ends."""
    train_sft()
    ((arguments, options),) = commands
    assert arguments == [sys.executable, ROOT / "sft.py"] and arguments[1].is_file()
    assert options.keys() == {"env", "preexec_fn"} and options["preexec_fn"] is die_with_parent


def test_torchruns_variables_are_left_out(commands, monkeypatch):
    """The command is a run of its own. Every variable that torchrun did not set reaches it."""
    monkeypatch.setenv("TULU_DATA", "kept")
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    train_sft()
    environment = commands[0][1]["env"]
    assert environment["TULU_DATA"] == "kept" and "PATH" in environment
    assert not environment.keys() & {*names, "RANK", "WORLD_SIZE"}


def test_a_failed_command_is_an_error(commands, monkeypatch):
    """`RunError` with the command's exit status."""
    failed = subprocess.CompletedProcess([], returncode=2)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunError, match="`python sft.py` ended with status 2"):
        train_sft()
