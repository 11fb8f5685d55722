"""Train the demo's SFT model with the command that a user would type.

dpo.py and generate.py go on from that model. Where it does not exist yet, they call `train_sft`, so
neither of them imports sft.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from program.errors import RunError
from program.ranks import die_with_parent, gather_lists

SFT = Path(__file__).parent.parent / "sft.py"
# What torchrun tells each rank (docs.pytorch.org/docs/stable/elastic/run.html). A child process
# that saw these variables would try to join the ranks of its parent.
TORCHRUN = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
}  # fmt: skip


def train_sft():
    """Run `python sft.py`, which trains the demo's model into `runs/demo/sft`.

    Every rank calls this function after `start`. Rank 0 runs the command and the others wait for
    it. Raises `RunError` on every rank if the command fails.
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


def without_torchrun(environment):
    """The environment variables, except those that torchrun sets for its workers."""
    return {
        name: value
        for name, value in environment.items()
        if name not in TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
