"""The resumable state of a run: checkpoints/step-000500/ with model, optimizer and a manifest.

A checkpoint is made whole in `save_run`: torch.distributed.checkpoint writes the shards into
`partial/`, the manifest lists their digests, and the rename to `step-000500/` comes last. A kill
leaves the old state or the new one. `resume_run` trusts only what agrees with its manifest.
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
    """Save the state after `step` updates as `folder/checkpoints/step-…`. Every rank calls it.

    The `keep` newest checkpoints stay. Raises `RunError` on all ranks if the disk refuses; earlier
    checkpoints are untouched then.
    """
    place = Path(folder) / "checkpoints" / f"step-{step:06}"
    if place.exists() and damage(place) is None:
        return
    partial, failure, digests = place.with_name("partial"), None, {}
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        fsync(Path(folder) / "metrics.jsonl")  # the log must not be behind the state
    weights, moments = get_state_dict(model, optimizer)
    try:
        # If it fails on one rank, it raises on all of them.
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
        digests = {name: digest(partial / name) for name in own_share(os.listdir(partial))}
    except (dcp.api.CheckpointException, OSError) as error:
        failure = error
    files = dict(gather_lists(list(digests.items())))
    if dist.get_rank() == 0 and failure is None:
        try:
            with open(partial / "manifest.json", "w") as file:
                json.dump({"step": step, "files": files}, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(place, ignore_errors=True)  # a damaged checkpoint of the same update
            os.rename(partial, place)
            fsync(place.parent)
            # Checkpoints of later updates are damaged, or the run would have resumed from them.
            newest_first = saved_runs(folder)
            this = newest_first.index(place)
            for old in newest_first[:this] + newest_first[this + keep :]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            failure = error
    if dist.get_rank() == 0 and failure is not None:
        shutil.rmtree(partial, ignore_errors=True)
    raise_together(failure, f"{place}: the checkpoint could not be saved")


def resume_run(folder, model, optimizer):
    """Load the newest checkpoint that is whole. Returns its number of updates, 0 if there is none.

    A damaged checkpoint is named in a warning, and the one before it is tried. The number of ranks
    may differ from that of the run that saved it.
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
    """The checkpoints of a run, newest first; from update 1,000,000 on names are longer."""
    places = (Path(folder) / "checkpoints").glob("step-*")
    return sorted(places, key=lambda place: (len(place.name), place.name), reverse=True)


def damage(place):
    """What is wrong with a checkpoint, or None. Every rank calls it and checks its share."""
    problems = []
    try:
        files = json.loads((place / "manifest.json").read_text())["files"]
        for name in own_share(files):
            if digest(place / name) != files[name]:
                problems.append(f"{name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{error!r}")
    return next(iter(gather_lists(problems)), None)
