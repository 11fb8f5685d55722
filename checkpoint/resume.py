"""The resumable state of a run: checkpoints/step-000500/ with model, optimizer and a manifest.

A checkpoint is made whole in `save_run`: torch.distributed.checkpoint writes the shards into
`partial/`, the manifest lists their digests, and the rename to `step-000500/` comes last. A kill
leaves the old state or the new one. `resume_run` trusts only what agrees with its manifest.
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from checkpoint.disk import checkpoint_bytes, explained
from program.errors import InputError
from program.files import digest, fsync, read_object
from program.ranks import gather_lists, own_share, raise_together

# The state of what is trained. Frozen weights are those of the folder that training started from.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_run(
    folder: str | Path, step: int, model: nn.Module, optimizer: optim.Optimizer, keep: int,
    facts: dict,
) -> None:  # fmt: skip
    """Save the state after `step` updates as `folder/checkpoints/step-…`. Every rank calls it.

    The `keep` newest checkpoints stay. facts: the run's (see `open_run`), for the manifest. Raises
    `RunError` on all ranks if the disk refuses; earlier checkpoints are untouched then.
    """
    place = Path(folder) / "checkpoints" / f"step-{step:06}"
    if place.exists() and damage(place) is None:
        return
    partial, failure, digests = place.with_name("partial"), None, None
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        fsync(Path(folder) / "metrics.jsonl")  # the log must not be behind the state
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    try:
        # If it fails on one rank, it raises on all of them.
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
        digests = {name: digest(partial / name) for name in own_share(os.listdir(partial))}
    except (dcp.api.CheckpointException, OSError) as error:
        failure = error
    shares = gather_lists([digests])  # one of each rank; None of a rank that failed, maybe alone
    if dist.get_rank() == 0 and None not in shares:
        files = {name: found for share in shares for name, found in share.items()}
        try:
            with open(partial / "manifest.json", "w") as file:
                json.dump({"step": step, "run": facts, "files": files}, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(place, ignore_errors=True)  # a damaged checkpoint of the same update
            os.rename(partial, place)
            fsync(place.parent)
            # Checkpoints of later updates are damaged, or the run would have resumed from them.
            newest_first = saved_runs(folder)
            for old in newest_first[: newest_first.index(place)]:
                shutil.rmtree(old, ignore_errors=True)
            drop_older(folder, place, keep)
        except OSError as error:
            failure = error
    if dist.get_rank() == 0 and (failure is not None or None in shares):
        shutil.rmtree(partial, ignore_errors=True)
    if failure is not None:
        advice = f"; a --keep less than {keep} needs less" if keep > 1 else ""
        failure = explained(failure, folder, checkpoint_bytes(model), advice)
    raise_together(failure, f"{place}: the checkpoint could not be saved")


def drop_older(folder: str | Path, place: Path, keep: int) -> None:
    """Remove the checkpoints before `place` that are not among the `keep` newest."""
    newest_first = saved_runs(folder)
    for old in newest_first[newest_first.index(place) + keep :]:
        shutil.rmtree(old, ignore_errors=True)


def remove_checkpoints(folder: str | Path, but_newest: bool = False) -> None:
    """Remove a run's resumable state, or all but the newest; what else stands there stays."""
    checkpoints = Path(folder) / "checkpoints"
    for place in [*saved_runs(folder)[but_newest:], checkpoints / "partial"]:
        shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is none, or something else is in it
        checkpoints.rmdir()


def resume_run(folder: str | Path, model: nn.Module, optimizer: optim.Optimizer, keep: int) -> int:
    """Load the newest checkpoint that is whole. Returns its number of updates, 0 if there is none.

    A damaged checkpoint is named in a warning, and the one before it is tried. Older ones than the
    `keep` newest are removed, to make room. The number of ranks may differ from that of the run
    that saved it. Raises `InputError` for a checkpoint of another model.
    """
    for place in saved_runs(folder):
        if (problem := damage(place)) is not None:
            if dist.get_rank() == 0:
                print(
                    f"warning: {place} is damaged ({problem}), trying the one before it",
                    file=sys.stderr,
                    flush=True,
                )
            continue
        weights, moments = get_state_dict(model, optimizer, options=TRAINED)
        state = {"model": weights, "optimizer": moments}
        try:
            dcp.load(state, checkpoint_id=place)
        except dcp.api.CheckpointException as error:
            reason = explained(error, folder)
            raise InputError(f"{place}: does not fit the model to be trained ({reason})") from None
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINED,
        )
        if dist.get_rank() == 0:
            drop_older(folder, place, keep)
        return json.loads((place / "manifest.json").read_text())["step"]
    if saved_runs(folder) and dist.get_rank() == 0:
        print("warning: no checkpoint is whole, training starts again", file=sys.stderr)
    return 0


def saved_runs(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return step_folders(Path(folder) / "checkpoints")


def step_folders(folder: Path) -> list[Path]:
    """Each `step-<update>` in a folder, newest first; a user's own `step-backup` is none."""
    places = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    # From update 1,000,000 on names are longer.
    return sorted(places, key=lambda place: (len(place.name), place.name), reverse=True)


def recorded_facts(folder: str | Path, unknown: object) -> list[tuple]:
    """`[(place, facts)]` of the checkpoints in `folder`, of all whose manifest can be read.

    A manifest from before it held the facts has those of `unknown`.
    """
    runs = []
    for place in saved_runs(folder):
        with contextlib.suppress(OSError, InputError):  # damaged; `resume_run` says so
            runs.append((place.name, read_object(place / "manifest.json").get("run", unknown)))
    return runs


def damage(place: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Every rank calls it and checks its share."""
    problems = []
    try:
        manifest = read_object(place / "manifest.json")
        files = manifest["files"]
        if place.name != f"step-{manifest['step']:06}":
            problems.append(f"its manifest is that of update {manifest['step']}")
        for name in own_share(files):
            if digest(place / name) != files[name]:
                problems.append(f"{name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{error!r}")
    return next(iter(gather_lists(problems)), None)
