"""demo/command.py: the demo's SFT is run as a user would run it, outside torchrun's ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo.command import train_sft
from program.errors import RunError
from program.ranks import die_with_parent, start

ROOT = Path(__file__).parent.parent.parent


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
