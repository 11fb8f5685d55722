"""The resumable state of a run: checkpoints/step-000500/ with model, optimizer and a manifest.

A checkpoint is written under another name and renamed when whole, so a kill leaves either the old
state or the new one.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from program.files import digest, fsync
from program.ranks import gather_lists, own_share, raise_together


def save_run(folder, step, model, optimizer, keep):
    """Save the state after `step` updates as `folder/checkpoints/step-…`; every rank calls it.

    The `keep` newest stay. Raises `RunError` on all ranks where the disk refuses; what was saved
    before is untouched then.
    """
    place = Path(folder) / "checkpoints" / f"step-{step:06}"
    if place.exists() and damage(place) is None:
        return
    partial, failure, own = place.with_name("partial"), None, {}
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        fsync(Path(folder) / "metrics.jsonl")  # the records before the state that follows them
    weights, moments = get_state_dict(model, optimizer)
    try:
        # DCP tells every rank of a failure on any.
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
        own = {name: digest(partial / name) for name in own_share(os.listdir(partial))}
    except (dcp.api.CheckpointException, OSError) as error:
        failure = error
    files = dict(gather_lists(list(own.items())))
    if dist.get_rank() == 0:
        try:
            if failure is None:
                with open(partial / "manifest.json", "w") as file:
                    json.dump({"step": step, "files": files}, file)
                    file.flush()
                    os.fsync(file.fileno())
                shutil.rmtree(place, ignore_errors=True)  # a damaged one
                os.rename(partial, place)
                fsync(place.parent)
                # A newer one is damaged: else the run would have gone on from there.
                newest_first = saved_runs(folder)
                own = newest_first.index(place)
                for old in newest_first[:own] + newest_first[own + keep :]:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            failure = error
        if failure is not None:
            shutil.rmtree(partial, ignore_errors=True)
    raise_together(failure, f"{place}: the checkpoint could not be saved")


def resume_run(folder, model, optimizer):
    """Load the newest whole checkpoint, if any; the number of updates it holds, else 0.

    A damaged one is named in a warning and the one before it is used. Model and optimizer may be
    sharded over another number of ranks than when they were saved.
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
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=place)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return json.loads((place / "manifest.json").read_text())["step"]
    if saved_runs(folder) and dist.get_rank() == 0:
        print("warning: no checkpoint is whole, training starts again", file=sys.stderr)
    return 0


def saved_runs(folder):
    """The checkpoints of a run, newest first (longer names, of later updates, before shorter)."""
    found = (Path(folder) / "checkpoints").glob("step-*")
    return sorted(found, key=lambda place: (len(place.name), place.name), reverse=True)


def damage(place):
    """What is wrong with a checkpoint, None where it is whole; each rank checks its share."""
    problems = []
    try:
        files = json.loads((place / "manifest.json").read_text())["files"]
        for name in own_share(files):
            if digest(place / name) != files[name]:
                problems.append(f"{name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{error!r}")
    return next(iter(gather_lists(problems)), None)
