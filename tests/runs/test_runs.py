"""runs/: the commands of the scripts, with a torchrun that only writes its arguments to a file."""

import os
import shutil
import subprocess

import pytest

import dpo
import sft
from conftest import ROOT
from program.flags import parse_args

TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" "" >> "$LOG"
while [[ $1 != --out ]]; do shift; done
[[ -n ${KILLED-} ]] && exit 1
mkdir -p "$2" && touch "$2/config.json"
"""


@pytest.fixture
def start(tmp_path):
    """`start(script, *arguments)`: the finished process, and its torchrun commands as lists."""
    repository, log = tmp_path / "repository", tmp_path / "log"
    (repository / "runs").mkdir(parents=True)
    for script in (ROOT / "runs").glob("*.sh"):
        shutil.copy(script, repository / "runs")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text(TORCHRUN)
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(log)}

    def run(script, *arguments, **more):
        log.write_text("")
        done = subprocess.run(
            [repository / "runs" / script, *arguments],
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
        )
        return done, [command.splitlines() for command in log.read_text().split("\n\n")[:-1]]

    return run


def split(command):
    """torchrun's own flags, the name of the program, and the config that its flags make."""
    at = next(i for i, word in enumerate(command) if word.endswith(".py"))
    config = {"sft.py": sft.SFTConfig, "dpo.py": dpo.DPOConfig}[command[at]]
    return command[:at], command[at], config(**parse_args(config, command[at + 1 :]))


@pytest.mark.parametrize("size, rate", [("7b", 2e-5), ("13b", 2e-5), ("70b", 1e-5)])
def test_tulu_2(start, tmp_path, size, rate):
    """SFT, then DPO from its result, with appendix B's settings and the right paths."""
    done, commands = start("tulu2.sh", size, "llama", "mix.jsonl", "/abs/prefs", "--nnodes", "4")
    assert done.returncode == 0, done.stderr
    (launch, first, one), (_, second, two) = map(split, commands)
    assert launch == ["--nproc_per_node", "gpu", "--nnodes", "4"]
    assert (first, second) == ("sft.py", "dpo.py")
    assert (one.epochs, one.batch_size, one.max_seq_len, one.lr) == (2, 128, 8192, rate)
    assert (two.epochs, two.batch_size, two.max_seq_len, two.lr) == (3, 32, 8192, 5e-7)
    assert (one.warmup_ratio, two.warmup_ratio, two.beta) == (0.03, 0.1, 0.1)
    for config in (one, two):
        assert (config.beta1, config.beta2, config.weight_decay, config.clip) == (0.9, 0.95, 0, 1)
        assert config.save_every > 0
    assert one.model == str(tmp_path / "llama") and one.data == [str(tmp_path / "mix.jsonl")]
    assert two.model == one.out and two.data == ["/abs/prefs"] and two.out != one.out


@pytest.mark.parametrize("size", ["7b", "13b", "34b"])
def test_code_tulu_2(start, tmp_path, size):
    """SFT alone, with appendix B's settings."""
    done, commands = start("code_tulu2.sh", size, "llama", "mix.jsonl")
    assert done.returncode == 0, done.stderr
    ((_, program, config),) = map(split, commands)
    assert program == "sft.py" and config.model == str(tmp_path / "llama")
    assert (config.epochs, config.batch_size, config.max_seq_len, config.lr) == (2, 128, 8192, 2e-5)
    assert config.out.endswith(size)


@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_qlora(start, tmp_path, size):
    """SFT alone, with the settings of the paper's QLoRA models."""
    done, commands = start("qlora.sh", size, "llama", "mix.jsonl")
    assert done.returncode == 0, done.stderr
    ((_, program, config),) = map(split, commands)
    assert program == "sft.py" and config.model == str(tmp_path / "llama")
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (64, 16, 0.1)
    assert (config.quantize, config.weight_decay, config.warmup_ratio) == ("nf4", 0, 0.03)
    assert (config.epochs, config.batch_size, config.max_seq_len, config.lr) == (5, 128, 4096, 1e-4)
    assert config.out.endswith(f"qlora-{size}")


def test_started_again(start):
    """A stage that failed runs again; SFT does not run again once it is done."""
    arguments = ("tulu2.sh", "7b", "llama", "mix", "prefs")
    done, commands = start(*arguments, KILLED="1")
    assert done.returncode == 1 and [split(c)[1] for c in commands] == ["sft.py"]
    _, commands = start(*arguments)
    assert [split(c)[1] for c in commands] == ["sft.py", "dpo.py"]
    _, commands = start(*arguments)  # dpo.py would go on, or say that it is finished
    assert [split(c)[1] for c in commands] == ["dpo.py"]


@pytest.mark.parametrize("script", ["tulu2.sh", "code_tulu2.sh", "qlora.sh"])
def test_bad_arguments(start, script):
    """Too few arguments or an unknown size: one line, status 2, nothing started."""
    for arguments in ((), ("7b",), ("7b", "llama"), ("8b", "llama", "mix", "prefs")):
        done, commands = start(script, *arguments)
        assert done.returncode == 2 and not commands
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_scripts_can_be_started():
    """The scripts are executable, so that `runs/x.sh` starts them."""
    for script in (ROOT / "runs").glob("*.sh"):
        assert os.access(script, os.X_OK), script
