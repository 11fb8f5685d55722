"""Runs that are killed, stopped, or meet a full disk or damaged files: what survives, and that the
same command afterwards ends with the weights of a run that nothing befell."""

import errno
import functools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import sft
import token_cache
from checkpoint import saved_runs
from errors import InputError, RunError, reported
from run_folder import append_record, lock_output, read_records

SFT = Path(sft.__file__)
# 3 updates an epoch, 12 in all.
RECIPE = {"epochs": 4, "batch_size": 8, "lr": 1e-2, "warmup_ratio": 0.1}
LAST = 12

# Every run that comes to harm is a process of its own, forked from one that has imported sft.py
# (and torch._dynamo, which making a model imports: half of such a run's time).
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sft", "torch._dynamo"])


@pytest.fixture
def flags(base, conversations, tmp_path):
    out = str(tmp_path / "out")
    return RECIPE | {"model": str(base), "data": [str(conversations)], "out": out}


@pytest.fixture(scope="module")
def uninterrupted(base, conversations, tmp_path_factory):
    """The output folder of a run that nothing befell."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    flags = RECIPE | {"model": str(base), "data": [str(conversations)], "out": str(out)}
    assert harmed(flags) == 0
    return out


@pytest.fixture(autouse=True)
def same_signals():
    """A run in this process watches for signals; put the handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def harmed(flags, harm=None, at=0, calls=(), log=None, ranks=1):
    """Run sft.py in a process that does itself `harm` at its `at`-th of the `calls`; the status.

    harm: a signal to send itself, "full" (the disk: the call fails with ENOSPC), or a number of
    bytes of which no file may have more, from the start. With several `ranks` all do the same.
    """
    processes = [
        FORKS.Process(target=harmed_main, args=(flags, harm, at, calls, log, rank, ranks, port))
        for port in [free_port()]
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    statuses = {process.exitcode for process in processes}
    return statuses.pop() if len(statuses) == 1 else statuses


def torchrun(flags):
    """The command line of two ranks under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(SFT)]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        command += ["--" + name.replace("_", "-"), *map(str, values)]
    return command


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return any_port.getsockname()[1]


def harmed_main(flags, harm, at, calls, log, rank, ranks, port):
    torch.set_num_threads(1)
    if ranks > 1:
        names = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
    if log:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    count = 0

    def counted(function):
        def wrapper(*args, **options):
            nonlocal count
            count += 1
            if count == at and harm == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if count == at:
                os.kill(os.getpid(), harm)
            return function(*args, **options)

        return wrapper

    for owner, name in calls:
        setattr(sys.modules[owner], name, counted(getattr(sys.modules[owner], name)))
    if not calls and harm:
        resource.setrlimit(resource.RLIMIT_FSIZE, (harm, harm))
    with reported():
        sft.main(flags)


def steps(out):
    records = read_records(Path(out) / "metrics.jsonl")
    assert records[0]["event"] == "start"
    return [record["step"] for record in records if "step" in record]


def assert_same_run(out, expected):
    """Every step once and in order, the same losses, and the same bits in every saved tensor."""
    assert steps(out) == list(range(1, LAST + 1))
    losses = [
        [r["loss"] for r in read_records(Path(folder) / "metrics.jsonl") if "loss" in r]
        for folder in (out, expected)
    ]
    assert losses[0] == losses[1]
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (out, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(Path(out).rglob("*partial*"))


# ---- kill -9

RENAME, REPLACE, FSYNC = ("os", "rename"), ("os", "replace"), ("os", "fsync")
DELETE, LOG = ("shutil", "rmtree"), ("sft", "append_record")


def test_killed_again_and_again(flags, uninterrupted):
    """Killed at every stage of saving, each time further on: the end is the same, bit for bit."""
    flags |= {"save_every": 2}
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


def test_killed_at_random(flags, uninterrupted):
    """Killed from outside after a random time, up to four times, then left alone."""
    flags |= {"save_every": 1}
    rng = random.Random(0)
    for _ in range(4):
        process = FORKS.Process(target=harmed_main, args=(flags, None, 0, (), None, 0, 1, 0))
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
    """Under torchrun: killed alone it takes its ranks along, and SIGTERM saves and stops them all.

    What two ranks left, one goes on with, equal up to rounding.
    """
    out = tmp_path / "out"
    flags = RECIPE | {"model": str(base), "data": [str(conversations)], "out": str(out)}
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
        launcher.send_signal(number)
        return launcher.wait(60), (tmp_path / "log").read_text()

    start_and(signal.SIGKILL, 3)
    # The ranks are in sessions of their own; what they hold is the folder.
    os.close(lock_output(out, patience=5))

    status, log = start_and(signal.SIGTERM, 5)
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
    ours, theirs = losses_of(out), losses_of(reference["out"])
    # fp32 sums in another order, through a dozen updates of AdamW at a high rate
    assert np.allclose(ours, theirs, rtol=2e-3)


# ---- Signals


def test_stopped_by_signals(flags, uninterrupted, tmp_path):
    """SIGTERM and SIGINT end the update, save, and exit with 128 + their number, each time."""
    log = tmp_path / "log"
    for number, at, step in (
        (signal.SIGTERM, 2, 3),
        (signal.SIGINT, 1, 5),
        (signal.SIGTERM, 6, LAST),  # in the very last update, when only saving is left
    ):
        assert harmed(flags, number, at, [LOG], log) == 128 + number
        assert steps(flags["out"]) == list(range(1, step + 1))
        assert saved_runs(flags["out"])[0].name == f"step-{step:06}"
        assert f"stopped by a signal after update {step}; the same command" in log.read_text()
    assert "Traceback" not in log.read_text() and "error" not in log.read_text()
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_interrupted_before_the_first_update(flags, tmp_path):
    """Ctrl-C while the data are read: no traceback, status 130, nothing half made."""
    log = tmp_path / "log"
    status = harmed(flags, signal.SIGINT, 1, [("data", "token_cache")], log)
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in log.read_text()
    assert not Path(flags["out"]).exists()


# ---- Damaged checkpoints and logs


@pytest.fixture(scope="module")
def killed(base, conversations, tmp_path_factory):
    """The output folder of a run that was killed with checkpoints of updates 4 and 6."""
    out = tmp_path_factory.mktemp("killed") / "out"
    flags = RECIPE | {"model": str(base), "data": [str(conversations)], "out": str(out)}
    assert harmed(flags | {"save_every": 2}, signal.SIGKILL, 8, [LOG]) == -signal.SIGKILL
    assert [place.name for place in saved_runs(out)] == ["step-000006", "step-000004"]
    return out


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def no_json(path):
    path.write_text("[]")


@pytest.mark.parametrize(
    "name, harm",
    [
        ("__0_0.distcp", flip_byte),
        ("__0_0.distcp", cut_short),
        (".metadata", Path.unlink),
        ("manifest.json", Path.unlink),
        ("manifest.json", no_json),
    ],
)
def test_damaged_checkpoint(flags, killed, uninterrupted, tmp_path, name, harm):
    """The newest checkpoint is damaged: a warning names it and the one before it is used."""
    shutil.copytree(killed, flags["out"])
    harm(Path(flags["out"]) / "checkpoints" / "step-000006" / name)
    log = tmp_path / "log"
    # One checkpoint stays, and it is the new one: the damaged one does not count.
    flags |= {"save_every": 5, "keep": 1}
    assert harmed(flags, log=log) == 0
    assert "step-000006 is damaged (" in log.read_text()
    assert "trying the one before it" in log.read_text()
    assert "continued after 4" in log.read_text()
    assert_same_run(flags["out"], uninterrupted)
    assert [place.name for place in saved_runs(flags["out"])] == ["step-000010"]


def test_damaged_newest_is_not_kept_for_a_good_one(flags, killed, tmp_path):
    """A save at an update before a damaged checkpoint's stays, whatever --keep."""
    shutil.copytree(killed, flags["out"])
    flip_byte(Path(flags["out"]) / "checkpoints" / "step-000006" / "__0_0.distcp")
    flags |= {"save_every": 5, "keep": 1}
    assert harmed(flags, signal.SIGKILL, 2, [LOG]) == -signal.SIGKILL  # after the save at 5
    assert [place.name for place in saved_runs(flags["out"])] == ["step-000005"]


def test_no_whole_checkpoint_left(flags, killed, uninterrupted, tmp_path):
    """All checkpoints are damaged: the run says so and starts again from the model."""
    shutil.copytree(killed, flags["out"])
    for place in saved_runs(flags["out"]):
        flip_byte(place / "__0_0.distcp")
    assert harmed(flags, log=tmp_path / "log") == 0
    assert "no checkpoint is whole, training starts again" in (tmp_path / "log").read_text()
    assert_same_run(flags["out"], uninterrupted)


@pytest.mark.parametrize("tail", [b'{"step": 8, "lo', b"\0" * 100])
def test_half_written_log(flags, killed, uninterrupted, tail):
    """A last line that was cut short, or the zeros of a lost page, do not hinder going on."""
    shutil.copytree(killed, flags["out"])
    with open(Path(flags["out"]) / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_other_number_of_ranks(flags, killed, tmp_path):
    """Two ranks go on with what one saved, with rows that do not come out even, and equal it."""
    shutil.copytree(killed, flags["out"])
    flags["micro_tokens"] = 500
    assert harmed(flags, ranks=2) == 0
    one = flags | {"out": str(tmp_path / "one")}
    shutil.copytree(killed, one["out"])
    assert harmed(one) == 0
    assert steps(flags["out"]) == list(range(1, LAST + 1))
    # AdamW's first updates divide by the gradient's size: rounding (1e-7) grows a thousandfold.
    assert np.allclose(losses_of(flags["out"]), losses_of(one["out"]), rtol=1e-4)


def losses_of(out):
    return [r["loss"] for r in read_records(Path(out) / "metrics.jsonl") if "loss" in r]


# ---- Full disks


def test_full_disk_during_checkpoint(flags, killed, uninterrupted, tmp_path):
    """No room for a checkpoint: an error line, status 1; the older ones stay and serve later."""
    shutil.copytree(killed, flags["out"])
    log = tmp_path / "log"
    flags |= {"save_every": 2}
    for harm, at, calls in ((300_000, 0, []), ("full", 4, [FSYNC]), ("full", 2, [RENAME])):
        assert harmed(flags, harm, at, calls, log) == 1
        (line,) = [line for line in log.read_text().splitlines() if "error: " in line]
        assert "step-000008: the checkpoint could not be saved (" in line
        assert "what was saved before is untouched" in line
        names = [place.name for place in (Path(flags["out"]) / "checkpoints").iterdir()]
        assert sorted(names) == ["step-000004", "step-000006"]
        log.unlink()
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_full_disk_during_checkpoint_of_two_ranks(flags, killed, tmp_path):
    """All ranks learn of it and stop; none hangs."""
    shutil.copytree(killed, flags["out"])
    log = tmp_path / "log"
    assert harmed(flags | {"save_every": 2}, 150_000, log=log, ranks=2) == 1
    assert "the checkpoint could not be saved" in log.read_text()
    assert len(saved_runs(flags["out"])) == 2


def test_full_disk_during_the_last_save(flags, killed, uninterrupted, tmp_path):
    """No room for the model: an error line, status 1, nothing half made; later the run ends."""
    shutil.copytree(killed, flags["out"])
    log = tmp_path / "log"
    for harm, at, calls in ((50_000, 0, []), ("full", 2, [FSYNC]), ("full", 7, [REPLACE])):
        assert harmed(flags, harm, at, calls, log) == 1
        assert "the model could not be saved (" in log.read_text()
        assert not (Path(flags["out"]) / "config.json").exists()
        assert not (Path(flags["out"]) / "hf.partial").exists()
        assert len(saved_runs(flags["out"])) == 2
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_full_disk_for_the_log():
    """The log's own error names it."""
    with pytest.raises(RunError, match="/dev/full: the log could not be written .No space left"):
        append_record(Path("/dev/full"), {"step": 1})


# ---- One folder, two runs; a loss that is not finite; few conversations


def test_two_runs_into_one_folder(flags, monkeypatch):
    """The second one is refused while the first one lives."""
    lock = lock_output(flags["out"])
    monkeypatch.setattr(sft, "lock_output", functools.partial(lock_output, patience=0.1))
    with pytest.raises(InputError, match="out: another run is writing there"):
        sft.main(flags)
    os.close(lock)
    assert os.listdir(flags["out"]) == []


def test_loss_that_is_not_finite(flags, tmp_path):
    """It stops every rank before the weights change, and names the update and its conversations."""
    flags |= {"lr": 1e30, "save_every": 1}
    done = subprocess.run(torchrun(flags), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]  # one for two ranks
    update = len(steps(flags["out"])) + 1
    assert f"error: update {update}: loss " in line and "nan" in line
    assert "stopped before the weights changed" in line
    assert line.count("(id made-up-") == flags["batch_size"]
    assert saved_runs(flags["out"])[0].name == f"step-{update - 1:06}"
    assert not (Path(flags["out"]) / "config.json").exists()


def test_fewer_conversations_than_an_update_takes(flags, capsys):
    """One update an epoch, of all there are, and a warning."""
    sft.main(flags | {"batch_size": 100, "epochs": 2})
    assert "warning: 24 conversations are fewer than --batch-size 100" in capsys.readouterr().err
    assert steps(flags["out"]) == [1, 2]


# ---- The token cache


@pytest.fixture
def cached(base, conversations, tmp_path):
    """A data file with its token cache, and a function that reads it anew."""
    path = Path(shutil.copy(conversations, tmp_path))

    def read(fallback=None):
        documents = data.Documents([path], base, 100, data.encode_conversation, fallback)
        return np.concatenate([documents[i][0] for i in range(len(documents))])

    return path, read


@pytest.mark.parametrize("harm", [cut_short, flip_byte, Path.unlink])
@pytest.mark.parametrize("name", ["tokens", "trained", "index", "manifest.json"])
def test_damaged_cache(cached, name, harm, capsys):
    """A cache of which any file is cut short, changed or gone is made anew."""
    path, read = cached
    expected = read()
    (cache,) = path.parent.glob("*.tokens-*")
    harm(cache / name)
    assert np.array_equal(read(), expected)
    assert "is damaged" in capsys.readouterr().err
    assert np.array_equal(read(), expected)
    assert capsys.readouterr().err == ""
    assert sorted(path.parent.iterdir()) == [path, cache]


def test_killed_builder(cached):
    """What a killed builder left behind hinders nobody."""
    path, read = cached
    expected = read()
    (cache,) = path.parent.glob("*.tokens-*")
    cache.rename(f"{cache}.partial")
    Path(f"{cache}.lock").touch()
    assert np.array_equal(read(), expected)
    assert sorted(path.parent.iterdir()) == [path, cache]


def test_builders_at_once(cached, base):
    """Two processes start at once; one builds, both read the same."""
    path, read = cached
    builders = [FORKS.Process(target=build, args=(path, base)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
        assert builder.exitcode == 0
    (cache,) = path.parent.glob("*.tokens-*")
    assert sorted(path.parent.iterdir()) == [path, cache]
    assert len(read()) > 0


def build(path, base):
    data.Documents([path], base, 100, data.encode_conversation)


def test_data_folder_that_cannot_be_written(cached, tmp_path, monkeypatch):
    """The cache then stands in the output folder; where there is none, an error says so."""
    path, read = cached

    def read_only(name, mode="r", *rest, **options):
        if "w" in mode and Path(name).parent == path.parent:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return open(name, mode, *rest, **options)

    monkeypatch.setattr(token_cache, "open", read_only, raising=False)
    with pytest.raises(InputError, match="Read-only file system, and the token cache needs a pl"):
        read()
    assert list(path.parent.iterdir()) == [path]
    tokens = read(tmp_path / "out")
    (cache,) = (tmp_path / "out").iterdir()
    assert cache.name.startswith("conversations.jsonl.tokens-")
    monkeypatch.undo()
    assert np.array_equal(read(), tokens)


def test_full_disk_for_the_cache(cached, monkeypatch):
    """An error that names the cache, and nothing half made."""
    path, read = cached

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache.json, "dumps", full)
    with pytest.raises(RunError, match="conversations.jsonl.tokens-.*No space left on device"):
        read()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_builder(base, conversations, tmp_path, number):
    """Killed or interrupted while all cores tokenise, no worker stays, and none complains."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(conversations.read_bytes() * 5000)
    command = [sys.executable, str(SFT.with_name("data.py")), "--model", base, "--data", path]
    with open(tmp_path / "log", "w") as log:
        # A session of its own, to be interrupted as a terminal does it: all processes at once.
        builder = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 60
    while not any(p.stat().st_size for p in tmp_path.glob("*.partial/tokens")):
        assert builder.poll() is None and time.monotonic() < until, "no worker delivered anything"
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(builder.pid, number)
    else:
        builder.kill()
    assert builder.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    until = time.monotonic() + 10
    while sessions(builder.pid):
        assert time.monotonic() < until, "workers stay behind"
        time.sleep(0.05)
    assert "Traceback" not in (tmp_path / "log").read_text()
    if number == signal.SIGINT:
        assert {p.name for p in tmp_path.iterdir()} == {"large.jsonl", "log"}


def sessions(leader):
    """The living processes of the session of `leader`, itself aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if rest[0] != "Z" and int(rest[3]) == leader and pid != leader:
            found.append(pid)
    return found
