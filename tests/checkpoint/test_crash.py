"""Runs that are killed or stopped by signals: the same command afterwards ends with the weights of
a run that nothing befell."""

import functools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import harm
import sft
from checkpoint.resume import saved_runs
from checkpoint.run_folder import lock_output, read_records
from harm import (
    DELETE,
    FORKS,
    FSYNC,
    LAST,
    LOG,
    RENAME,
    REPLACE,
    assert_same_run,
    harmed,
    losses,
    recipe,
    steps,
    torchrun,
)
from program.errors import InputError
from training import setup


@pytest.fixture
def flags(base, conversations, tmp_path):
    return recipe(base, conversations, tmp_path / "out")


# ---- kill -9


def test_killed_again_and_again(flags, uninterrupted):
    """Killed at every stage of saving, each time further on: the end is the same, bit for bit."""
    flags |= {"save_every": 2, "keep_checkpoints": True}
    for calls, at in (
        ([REPLACE], 1),  # before the log is there
        ([LOG], 2),  # before there is a checkpoint
        ([FSYNC], 3),  # in the first checkpoint
        ([RENAME], 2),  # when it is whole but for its name
        ([RENAME], 3),  # in the second (the one of update 2 is there now)
        ([DELETE], 5),  # when an old one goes
        ([LOG], 3),  # between two
        ([FSYNC], 7),  # when the model's tensors are written
        ([REPLACE], 4),  # when the model moves in
        ([REPLACE], 7),  # when only its config.json is missing
    ):
        assert harmed(flags, signal.SIGKILL, at, calls) == -signal.SIGKILL, (calls, at)
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)
    # After the last update, 12, there is the model: no checkpoint needs to be made.
    assert [place.name for place in saved_runs(flags["out"])] == ["step-000010", "step-000008"]


def test_killed_at_random(flags, uninterrupted):
    """Killed from outside after a random time, up to four times, then left alone."""
    flags |= {"save_every": 1}
    rng = random.Random(0)
    for _ in range(4):
        process = FORKS.Process(target=harm.main, args=("sft", flags))
        process.start()
        process.join(rng.uniform(0.2, 2.0))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
    else:
        assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_orphans(base, conversations, tmp_path):
    """Under torchrun: killed alone it stops its ranks, and SIGTERM to all three saves and stops.

    Its ranks then get two SIGTERMs, the one that torchrun passes on as well. What two ranks left,
    one goes on with, equal up to rounding.
    """
    out = tmp_path / "out"
    flags = recipe(base, conversations, out)
    flags["epochs"] = 100  # 300 updates: none of these runs comes to its end
    command = torchrun(flags | {"save_every": 2})

    def start_and(number, updates):
        with open(tmp_path / "log", "w") as log:
            launcher = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        until = time.monotonic() + 100
        while not (out / "metrics.jsonl").exists() or len(steps(out)) < updates:
            assert launcher.poll() is None and time.monotonic() < until, (
                tmp_path / "log"
            ).read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        launcher.send_signal(number)
        for child in children if number == signal.SIGTERM else []:
            os.kill(int(child), number)
        return launcher.wait(60), (tmp_path / "log").read_text()

    start_and(signal.SIGKILL, 3)
    # The ranks are in sessions of their own; what they hold is the folder.
    lock_output(out, patience=30).close()
    assert saved_runs(out)[0].name == f"step-{len(steps(out)):06}"  # they have saved first

    # Later than the log is now, or the signal would come before the new run looks out for it.
    status, log = start_and(signal.SIGTERM, len(steps(out)) + 2)
    stopped = len(steps(out))
    assert status != 0
    assert log.count(f"stopped by a signal after update {stopped:,}; the same command") == 1, log
    assert "error: " not in log
    assert steps(out) == list(range(1, stopped + 1))
    assert saved_runs(out)[0].name == f"step-{stopped:06}"

    flags["max_steps"] = stopped + 3
    assert harmed(flags) == 0
    reference = flags | {"out": str(tmp_path / "reference")}
    assert harmed(reference) == 0
    assert steps(out) == steps(reference["out"]) == list(range(1, stopped + 4))
    # fp32 sums in another order, through a dozen updates of AdamW at a high rate
    assert losses(out) == pytest.approx(losses(reference["out"]), rel=2e-3)


# ---- Signals


def test_stopped_by_signals(flags, uninterrupted, tmp_path):
    """They end the update, save, and exit with 128 + their number, each time."""
    log = tmp_path / "log"
    for number, at, step in (
        (signal.SIGTERM, 2, 3),
        (signal.SIGINT, 1, 5),
        (signal.SIGHUP, 1, 7),
        (signal.SIGUSR1, 1, 9),
        (signal.SIGTERM, 2, LAST),  # in the very last update, when only saving is left
    ):
        assert harmed(flags, number, at, [LOG], log) == 128 + number
        assert steps(flags["out"]) == list(range(1, step + 1))
        assert saved_runs(flags["out"])[0].name == f"step-{step:06}"
        assert f"stopped by a signal after update {step}; the same command" in log.read_text()
    assert "Traceback" not in log.read_text() and "error" not in log.read_text()
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_a_signal_to_one_rank_stops_both_after_the_same_update(flags, tmp_path):
    """Rank 1 alone gets a SIGUSR1 in update 3: both save it and stop there, with one message.

    And with one status, though rank 0 was told by rank 1 alone.
    """
    log = tmp_path / "log"
    plan = [("sft", "plan_rows")]  # once an update, on every rank
    assert harmed(flags, signal.SIGUSR1, 3, plan, log, ranks=2, struck=1) == 128 + signal.SIGUSR1
    assert log.read_text().count("stopped by a signal after update 3; the same command") == 1
    assert steps(flags["out"]) == [1, 2, 3]
    assert [place.name for place in saved_runs(flags["out"])] == ["step-000003"]


def test_a_stopped_run_in_bf16_goes_on_bit_for_bit(flags, tmp_path):
    """What a run that computes in bf16 keeps is fp32, weights and moments, and nothing is lost."""
    flags |= {"dtype": "bfloat16", "max_steps": 4}
    whole = flags | {"out": str(tmp_path / "whole")}
    assert harmed(whole) == 0
    assert harmed(flags, signal.SIGTERM, 1, [LOG]) == 128 + signal.SIGTERM
    saved = dcp.FileSystemReader(saved_runs(flags["out"])[0]).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in saved.items() if hasattr(entry, "properties")}
    assert sum(name.startswith("optimizer.") for name in tensors) > 2 * 20  # moments and steps
    assert {entry.properties.dtype for entry in tensors.values()} == {torch.float32}
    assert harmed(flags) == 0
    assert_same_run(flags["out"], whole["out"], last=4)


def test_interrupted_before_the_first_update(flags, tmp_path):
    """Ctrl-C while the data are read: no traceback, status 130, nothing half made."""
    log = tmp_path / "log"
    status = harmed(flags, signal.SIGINT, 1, [("tokens.documents", "token_cache")], log)
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in log.read_text()
    assert not Path(flags["out"]).exists()


# ---- One folder, two runs; a loss that is not finite; few conversations


def test_two_runs_into_one_folder(flags, monkeypatch):
    """The second one is refused while the first one lives."""
    lock = lock_output(flags["out"])
    monkeypatch.setattr(setup, "lock_output", functools.partial(lock_output, patience=0.1))
    with pytest.raises(InputError, match="out: another run is writing there"):
        sft.main(flags)
    lock.close()
    assert os.listdir(flags["out"]) == []


def test_loss_that_is_not_finite(flags, tmp_path):
    """It stops every rank before the weights change, and names the update and its conversations."""
    flags |= {"lr": 1e30, "save_every": 1}
    done = subprocess.run(torchrun(flags), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    # One for two ranks, on a line of its own, not behind the progress bar.
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    update = len(steps(flags["out"])) + 1
    assert line.startswith(f"error: update {update}: loss ") and "nan" in line
    assert "stopped before the weights changed" in line
    assert line.count("(id made-up-") == flags["batch_size"]
    assert saved_runs(flags["out"])[0].name == f"step-{update - 1:06}"
    assert not (Path(flags["out"]) / "config.json").exists()


def test_fewer_conversations_than_an_update_takes(flags, capsys):
    """One update an epoch, of all there are, and a warning; none where there are just enough."""
    sft.main(flags | {"batch_size": 100, "epochs": 2})
    said = capsys.readouterr()
    assert "warning: 24 conversations are fewer than --batch-size 100" in said.err
    assert "2 updates of 24 conversations, 1 an epoch\n" in said.out
    assert steps(flags["out"]) == [1, 2]
    sft.main(flags | {"batch_size": 24, "epochs": 1, "out": f"{flags['out']}-24"})
    assert "warning" not in capsys.readouterr().err


def test_one_update_of_one_conversation_trains(base, conversations, tmp_path, capsys):
    """At the full rate: the weights change by it. In the singular."""
    data = tmp_path / "one.jsonl"
    data.write_text(Path(conversations).read_text().splitlines(True)[0])
    flags = recipe(base, data, tmp_path / "out") | {"epochs": 1}
    sft.main(flags)
    said = capsys.readouterr()
    assert "warning: 1 conversation is fewer than --batch-size 8" in said.err
    assert "1 conversation, " in said.out and "1 update of 1 conversation, 1 an epoch\n" in said.out
    (record,) = (r for r in read_records(tmp_path / "out" / "metrics.jsonl") if "step" in r)
    assert record["lr"] == flags["lr"]
    before, after = (load_file(Path(f) / "model.safetensors") for f in (base, flags["out"]))
    name = "model.norm.weight"
    assert not torch.equal(before[name].bfloat16(), after[name])
