"""How a run lies in the memory of its ranks; what cannot fit is found before it is loaded.

Called by `open_run` of setup.py. The arithmetic is planning/'s.
"""

import dataclasses
import sys

import numpy as np
import torch
import torch.distributed as dist

from data import update_count, update_members
from model import LlamaConfig
from planning.fit import NEAR, check_fits, fastest, fits
from planning.memory import GIB, Layout
from planning.updates import largest_rows
from program.errors import amount
from program.ranks import gather_lists
from tokens.documents import Documents

AT_ONCE = 512  # updates whose rows are planned together


def layout_of(config, **facts) -> Layout:
    """The `Layout` that a loop's flags and these facts of the run make, on all ranks."""
    names = {field.name for field in dataclasses.fields(Layout)}
    flags = {name: value for name, value in vars(config).items() if name in names}
    flags["recompute"] = config.recompute or 0
    return Layout(ranks=dist.get_world_size(), **flags, **facts)


def lay_out(config, model_config: LlamaConfig, documents: Documents, device: torch.device) -> tuple:
    """`config` with `recompute` filled in, and what `shard` takes as `reshard`.

    On a GPU as few blocks recompute as let the run's longest row fit into what is free on every
    rank, unless the flags say how many; rank 0 prints the outcome in one line. Raises `InputError`,
    with what would fit, where nothing does. On a CPU nothing is asked.
    """
    if device.type == "cpu":
        return config, None
    free, _ = torch.cuda.mem_get_info(device)
    available = min(gather_lists([free / GIB]))
    row = longest_row(config, model_config.hidden_size, documents)
    layout, shortest = layout_of(config, **row), int(documents.tokens.max())
    layout, line, warning = choose(model_config, layout, available, config.recompute, shortest)
    if dist.get_rank() == 0:
        print(line)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    return dataclasses.replace(config, recompute=layout.recompute), not layout.keeps_gathered


def choose(
    model_config: LlamaConfig, layout: Layout, available: float, recompute: int | None,
    shortest: int,
) -> tuple[Layout, str, str | None]:  # fmt: skip
    """The layout to run on GPUs that have `available` GiB, a line about it, a warning or None.

    recompute: the number of blocks. None: as few as leave a twentieth of the memory free, or all of
    them where no number does. shortest: tokens of the longest document, below which no row can go.
    """
    chosen = dataclasses.replace(layout, recompute=recompute or 0)
    if recompute is None:
        blocks = model_config.num_hidden_layers
        least = dataclasses.replace(layout, recompute=blocks, reshard=layout.wrapped)
        chosen = fastest(model_config, layout, NEAR * available) or least
    elif layout.wrapped and layout.keeps_gathered:
        if not fits(model_config, chosen, NEAR * available):
            chosen = dataclasses.replace(chosen, reshard=True)
    gib, warning = check_fits(model_config, chosen, available, shortest)
    freed = layout.keeps_gathered and not chosen.keeps_gathered
    blocks = amount(model_config.num_hidden_layers, "blocks")
    line = (
        f"{chosen.recompute} of {blocks} recompute"
        f"{', gathered weights are freed between forward and backward' * freed}: {gib['total']:.1f}"
        f" of {available:.1f} GiB, rows of up to {amount(layout.row_tokens, 'tokens')}"
    )
    return chosen, line, warning


def longest_row(config, hidden_size: int, documents: Documents) -> dict[str, int]:
    """The most that any rank has in the run: tokens and trained tokens of a row, rows an update.

    As fields of a `Layout`. Every rank looks at its share of the updates, some at a time.
    """
    sizes = documents.tokens, documents.trained_counts.sum(1), documents.squares
    rank, world = dist.get_rank(), dist.get_world_size()
    _, total = update_count(len(documents), config.batch_size, config.epochs)
    own = range(rank, min(total, config.max_steps or total), world)
    most = [[1, 1, 1]]
    for part in range(0, len(own), AT_ONCE):
        members = np.stack([
            update_members(len(documents), config.batch_size, config.seed, step)[1]
            for step in own[part : part + AT_ONCE]
        ])  # fmt: skip
        parts = [each[members] for each in sizes]
        most.append(largest_rows(*parts, world, config.micro_tokens, hidden_size))
    names, everyone = ("row_tokens", "predicted", "rows"), gather_lists([np.max(most, 0).tolist()])
    return {name: int(max(each)) for name, *each in zip(names, *everyone, strict=True)}
