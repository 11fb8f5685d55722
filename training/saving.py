"""What a run leaves on disk between two updates: a checkpoint to go on from, a model to look at."""

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from checkpoint.resume import save_run
from checkpoint.run_folder import exported_models
from checkpoint.weights import save_adapter, save_hf
from program.files import fsync
from program.ranks import gather_lists, raise_together, sum_over_ranks
from training.flags import DEMO, OutputFlags
from training.held_out import is_due
from training.trackers import finish_trackers


def save_or_export(
    run, config, step: int, first: int, optimizer: torch.optim.Optimizer, stop: float,
    signals: list[int],
) -> float:  # fmt: skip
    """Save and export what is due after `step` updates. Returns whether the run is to stop.

    first: the updates that were done when this start of the program began. stop: whether a signal
    came in the update; one may also have cut short the measurement on held-out data. A run that
    --max-steps ends before its schedule does is saved, too, so that it can go on. Every rank calls
    it.
    """
    if not stop and is_due(run, config, step):
        (stop,) = sum_over_ranks([len(signals)], "cpu")
    is_periodic = config.save_every and step % config.save_every == 0 and step < run.last
    if step > first and (stop or is_periodic or step == run.last < run.total):
        save_run(run.out, step, run.model, optimizer, config.keep, run.facts)
    if not stop and step in exported_steps(run, config):
        export(run, config, step)
    return stop


def exported_steps(run, config: OutputFlags) -> range:
    """After which updates the model is exported. Not after the last: then it becomes OUT itself."""
    if config.export_every is None:
        return range(0)
    every = run.per_epoch if config.export_every == "epoch" else int(config.export_every)
    return range(every, run.last, every)


def exports_at_once(run, config: OutputFlags) -> int:
    """How many exported models the disk has to hold: with --keep-exports one more for a moment."""
    most = config.keep_exports + 1 if config.keep_exports else run.last
    return min(most, len(exported_steps(run, config)))


def adapters_alone(config) -> bool:
    """Whether an exported model is its adapters and nothing else."""
    return config.lora_rank > 0 and not config.export_merged


def export(run, config, step: int) -> None:
    """Write the model of now as the HF folder `OUT/step-…/`, unless the start before this one did.

    With adapters the folder holds them alone, in PEFT's format (--export-merged: the merged model).
    It is whole or absent. Raises `RunError` on all ranks if the disk refuses.
    """
    place, partial = run.out / f"step-{step:06}", run.out / "export.partial"
    rank, failure = dist.get_rank(), None
    if gather_lists([place.exists()] if rank == 0 else [])[0]:
        return
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    if adapters_alone(config):
        save_adapter(run.model, config.model, partial, run.facts)
    else:
        longest = run.documents.lengths.max()
        save_hf(run.model, run.tokenizer, config.model, partial, longest, run.facts)
    if rank == 0:
        try:
            os.rename(partial, place)
            fsync(run.out)
        except OSError as error:
            failure = error
        models = exported_models(run.out)
        for old in models[: -config.keep_exports] if config.keep_exports else []:
            shutil.rmtree(old, ignore_errors=True)
    raise_together(failure, f"{place}: the model could not be exported")


def stop_run(run, step: int, signals: list[int]) -> NoReturn:
    """End the program as a signal asks, after the checkpoint of update `step`."""
    if dist.get_rank() == 0:
        finish_trackers(run.trackers)
        after = going_on(run.config, "the same command continues it")
        print(f"stopped by a signal after update {step:,}; {after}")
    sys.exit(128 + gather_lists(signals)[0])


def going_on(config, command: str) -> str:
    """What the user can do with a run that ended early: `command`, but not in the demo's folder."""
    if Path(config.out) in map(Path, DEMO.values()):
        return f"the demo starts afresh every time; with an --out of your own, {command}"
    return command
