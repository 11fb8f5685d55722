"""Runs that come to harm: sft.py or dpo.py in processes that kill themselves, meet a full disk or
find their files damaged. For the tests of crash safety; the conventions of DESIGN are theirs.

Every such run is a process of its own, forked from one that has imported the programs (and
torch._dynamo, which making a model imports: half of a run's time).
"""

import errno
import multiprocessing
import os
import resource
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import dpo
import sft
from checkpoint.run_folder import read_records
from program.errors import reported

PROGRAMS = {"sft": sft, "dpo": dpo}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*PROGRAMS, "torch._dynamo"])

# Of sft.py on the 24 conversations of conftest.py: 3 updates an epoch, 12 in all.
RECIPE = {"epochs": 4, "batch_size": 8, "lr": 1e-2, "warmup_ratio": 0.1}
LAST = 12

# Where a run can be struck: (module, function).
RENAME, REPLACE, FSYNC = ("os", "rename"), ("os", "replace"), ("os", "fsync")
DELETE, LOG = ("shutil", "rmtree"), ("sft", "append_record")


def recipe(base, data, out):
    """The flags of a run of sft.py."""
    return RECIPE | {"model": str(base), "data": [str(data)], "out": str(out)}


def harmed(flags, harm=None, at=0, calls=(), log=None, ranks=1, program="sft", struck=None):
    """Run a program in a process that does itself `harm` at its `at`-th of the `calls`; the status.

    harm: a signal to send itself, "full" (the disk: the call fails with ENOSPC), or a number of
    bytes of which no file may have more, from the start. Of several `ranks` all do the same, or
    only rank `struck`. Statuses that differ come as a set.
    """
    port = free_port()
    processes = []
    for rank in range(ranks):
        trap = (harm, at, calls) if struck in (None, rank) else (None, 0, ())
        args = (program, flags, *trap, log, rank, ranks, port)
        processes.append(FORKS.Process(target=main, args=args))
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    statuses = {process.exitcode for process in processes}
    return statuses.pop() if len(statuses) == 1 else statuses


def main(program, flags, harm=None, at=0, calls=(), log=None, rank=0, ranks=1, port=0):
    """In the forked process: set the trap, then run."""
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
        PROGRAMS[program].main(flags)


def torchrun(flags):
    """The command line of two ranks of sft.py under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, sft.__file__]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        command += ["--" + name.replace("_", "-"), *map(str, values)]
    return command


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return any_port.getsockname()[1]


def steps(out):
    """The updates that the log of a run holds, in its order."""
    records = read_records(Path(out) / "metrics.jsonl")
    assert records[0]["event"] == "start"
    return [record["step"] for record in records if "step" in record]


def losses(out):
    """The losses that the log of a run holds, in its order."""
    return [r["loss"] for r in read_records(Path(out) / "metrics.jsonl") if "loss" in r]


def assert_same_run(out, expected, last=LAST):
    """Every step once and in order, the same losses, and the same bits in every saved tensor."""
    assert steps(out) == list(range(1, last + 1))
    assert losses(out) == losses(expected)
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (out, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(Path(out).rglob("*partial*"))


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)
