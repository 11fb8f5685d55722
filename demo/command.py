"""What sft.py, dpo.py and generate.py do around themselves where they run the demo.

Every rank calls these functions; rank 0 does the work, and the others wait for it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from demo import tasks
from demo.compare import compare
from program.errors import RunError
from program.ranks import die_with_parent, gather_lists, start

SFT = Path(__file__).parent.parent / "sft.py"
# What torchrun tells each rank (docs.pytorch.org/docs/stable/elastic/run.html). A child process
# that saw these variables would try to join the ranks of its parent.
TORCHRUN = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
}  # fmt: skip

FROM_NOTHING = """
Adapters alone do not teach the tasks to a base that knows nothing. See what they do for a model
that knows them: `torchrun sft.py`, then `torchrun dpo.py` with these flags."""


def wanted(flags: dict) -> bool:
    """Whether the command line asks for the demo: it names neither model nor data."""
    return not {"model", "data"} & flags.keys()


def prepare_sft(given: dict) -> dict:
    """Make the base model and the data, remove an earlier result; the flags of the demo's SFT.

    given: the flags of the command line, which come before the demo's own.
    """
    rank, *_ = start()
    if rank == 0:
        tasks.make()
    return begin(tasks.SFT, tasks.SFT_LORA, given)


def prepare_dpo(given: dict) -> dict:
    """Train SFT where it is missing, remove an earlier result; the flags of the demo's DPO.

    That SFT trains all weights, with `lora_rank` too: adapters need a model that can do something.
    """
    start()
    if not (Path(tasks.SFT["out"]) / "config.json").is_file():
        train_sft()
    return begin(tasks.DPO, tasks.DPO_LORA, given)


def begin(demo: dict, with_lora: dict, given: dict) -> dict:
    """The flags of a run of the demo. Its own output folder is emptied, another one is not."""
    flags = demo | (with_lora if given.get("lora_rank") else {}) | given
    if given.get("eval_share") and "eval_data" not in given:
        del flags["eval_data"]  # one or the other
    if dist.get_rank() == 0 and Path(flags["out"]) == Path(demo["out"]):
        shutil.rmtree(demo["out"], ignore_errors=True)
    dist.barrier()
    return flags


def show_effect(flags: dict) -> None:
    """Print what held-out prompts get before and after a run of the demo with these flags."""
    if dist.get_rank() == 0:
        compare(flags["model"], flags["out"])
        if flags.get("lora_rank") and flags["model"] == tasks.SFT["model"]:
            print(FROM_NOTHING)


def train_sft() -> None:
    """Run `python sft.py`, the command that a user would type, so that nobody imports sft.py.

    Raises `RunError` on every rank if the command fails.
    """
    status = []
    if dist.get_rank() == 0:
        done = subprocess.run(
            [sys.executable, SFT], env=without_torchrun(os.environ), preexec_fn=die_with_parent
        )
        status = [done.returncode]
    (status,) = gather_lists(status)
    if status != 0:
        raise RunError(f"the demo's SFT failed: `python sft.py` ended with status {status}")


def without_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables, except those that torchrun sets for its workers."""
    return {
        name: value
        for name, value in environment.items()
        if name not in TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
