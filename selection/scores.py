"""Scores of a data set, kept on disk while they are computed: what is missing is NaN.

A file of fp32, as many bytes as the scores take. It is made full of NaN, and filled group by group;
so a run that was killed goes on where it stopped, with any number of ranks, and scores that are
complete are used again. In memory are the groups in work alone.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from program.files import hold_file, written_aside
from program.ranks import gather_lists

BLOCK = 1 << 20  # numbers written at a time


@contextlib.contextmanager
def held(path: str | Path) -> Iterator[None]:
    """Hold what rank 0 writes, `path`, against other runs."""
    lock = hold_file(f"{path}.lock", path) if dist.get_rank() == 0 else None
    try:
        yield
    finally:
        if lock:
            os.unlink(lock.name)
            lock.close()


def open_scores(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """The scores of a file, memory-mapped, (…, candidates) fp32; made if there are none.

    Every rank calls it; only rank 0 may write.
    """
    numbers = int(np.prod(shape))
    if dist.get_rank() == 0 and not (path.exists() and path.stat().st_size == 4 * numbers):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path, "wb") as file:
            for start in range(0, numbers, BLOCK):
                file.write(np.full(min(BLOCK, numbers - start), np.nan, np.float32).data)
    dist.barrier()
    return np.memmap(path, np.float32, "r+" if dist.get_rank() == 0 else "r", shape=tuple(shape))


def missing(scores: np.ndarray) -> np.ndarray:
    """Which candidates of scores (queries, candidates) are not complete, (candidates,) bool."""
    found = np.zeros(scores.shape[1], np.bool_)
    for row in scores:
        found |= np.isnan(row)
    return found


def fill(
    scores: np.ndarray, groups: list[list[int]], tokens: np.ndarray, score_group: Callable,
    what: str,
) -> None:  # fmt: skip
    """Compute the candidates of scores (queries, candidates) that are missing; ranks share them.

    groups: lists of candidates, the same on every rank. tokens (candidates,): by these the time
    left is estimated. score_group(candidates) gives their scores (queries, n). what: for the bar.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    absent = missing(scores)
    left = [group for group in groups if absent[group].any()]
    dist.barrier()  # every rank has looked before rank 0 writes
    done = int((~absent).sum())
    bar = tqdm(
        total=int(tokens.sum()),
        initial=int(tokens[~absent].sum()),
        desc=what,
        disable=True if rank else None,
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}",
    )
    before = done
    for k in range(0, len(left), world):
        own = left[k + rank] if k + rank < len(left) else []
        for group, values in gather_lists([(own, score_group(own))] if own else []):
            if rank == 0:
                scores[:, group] = values
            done += int(absent[group].sum())
            bar.update(int(tokens[group][absent[group]].sum()))
        rate = (done - before) / max(bar.format_dict["elapsed"], 1e-3)
        bar.set_postfix_str(f", {done:,} conversations, {rate:,.1f}/s", refresh=False)
    if rank == 0:
        scores.flush()
    bar.close()
    dist.barrier()
