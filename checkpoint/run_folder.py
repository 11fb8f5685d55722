"""The output folder of a run: who may write there, and its log, metrics.jsonl.

The folder's other contents have files of their own: weights.py the model, resume.py the
checkpoints.
"""

import contextlib
import json
import math
import operator
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from checkpoint.disk import check_space
from checkpoint.resume import recorded_facts, saved_runs, step_folders
from program.errors import InputError, RunError, amount
from program.files import hold, hold_file, written_aside


def check_output(
    folder: str | Path, facts: dict, model: nn.Module, checkpoints: int = 1, exports: int = 0,
    adapters_alone: bool = False, last: float = math.inf,
) -> None:  # fmt: skip
    """Raise `InputError` unless this run may write to `folder`. Nothing is written here.

    The folder must be new or hold a run with the same `facts` (see `open_run`) that was
    interrupted, or that --max-steps ended before update `last`, with which this one ends. The disk
    must have room for the model, so many `checkpoints`, at least that of a signal, and so many
    models on the way, `exports` (see `check_space`).
    """
    folder = Path(folder)
    check_same_run(folder, facts, last)
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--out {folder}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {folder}: {parent} cannot be written")
    check_space(folder, model, checkpoints, exports, adapters_alone)


# Files that would override what is saved beside them, and those that saving would overwrite.
OVERRIDING = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
)
OVERWRITTEN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "adapter",
)


def check_same_run(folder: Path, facts: dict, last: float = math.inf) -> None:
    """Raise `InputError` if `folder` holds a finished run, a model, or a run with other facts.

    Both the log and the checkpoints say what run is theirs; a checkpoint from before they did is
    taken to be the log's. A run that --max-steps ended before update `last` can go on.
    """
    log = folder / "metrics.jsonl"
    for name in OVERRIDING:
        if (folder / name).exists():
            raise InputError(
                f"--out {folder}: holds {name}, which the saved model's readers would use, "
                "expected a new folder or an interrupted run's"
            )
    # A run that was killed while its model moved in has such files there, but no config.json yet.
    models = [path.name for path in exported_models(folder)]
    found = ["config.json", *([] if log.exists() else [*OVERWRITTEN, *models])]
    found = next((name for name in found if (folder / name).exists()), None)
    records = read_records(log) if log.exists() else []
    runs = [(log.name, next(iter(records), {}).get("run"))] if log.exists() else []
    runs += recorded_facts(folder, runs[0][1] if runs else None)
    others = [
        (name, (recorded if isinstance(recorded, dict) else {}).get(name), place)
        for place, recorded in runs
        for name in facts
        if not isinstance(recorded, dict) or recorded.get(name) != facts[name]
    ]
    done = max((record.get("step", 0) for record in records), default=0)
    ended_early = (folder / "checkpoints" / f"step-{done:06}").is_dir()
    if found and (others or not ended_early or done >= last):
        advice = ""
        if {name for name, *_ in others} == {"epochs"}:
            advice = (
                f"; with --epochs {facts['epochs']} in place of {others[0][1]} every learning rate "
                f"would have been another. To train on, begin with its result: --model {folder}"
            )
        elif not others and ended_early:
            ended = f"it ended after {amount(done, 'updates')}"
            advice = f"; {ended}, and a larger --max-steps goes on with it"
        raise InputError(
            f"--out {folder}: holds a finished run or a model ({found}), expected a new folder or "
            f"an interrupted run's{advice}"
        )
    for name, value, place in others:
        raise InputError(
            f"--out {folder}: holds a different run, with {name} {value!r} where this one has "
            f"{facts[name]!r} (in {place})"
        )
    newest = next(iter(saved_runs(folder)), None)
    if newest and (step := int(newest.name.removeprefix("step-"))) > last:
        raise InputError(
            f"--max-steps: the run ends after {amount(last, 'updates')}, and {newest} has {step:,} "
            "already: expected as many or more"
        )


def exported_models(folder: str | Path) -> list[Path]:
    """The models that --export-every wrote into the output folder, oldest first."""
    return step_folders(Path(folder))[::-1]


def lock_output(folder: str | Path, patience: float = 15) -> contextlib.ExitStack:
    """Make `folder` and lock out other runs until this process ends. Returns the lock.

    patience: seconds to wait for a run that was just killed. The lock is the folder's own. But NFS
    locks only what is open for writing: there it is a file in the folder, `.lock`, and
    `unlock_output` removes it. Closing the lock lets others in.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = contextlib.ExitStack()
    handle = os.open(folder, os.O_RDONLY)
    lock.callback(os.close, handle)
    try:
        try:
            hold(handle, folder, patience)
        except OSError:
            lock.enter_context(hold_file(Path(folder) / ".lock", folder, patience))
    except InputError:
        lock.close()
        raise
    return lock


def unlock_output(folder: str | Path, lock: contextlib.ExitStack) -> None:
    """Let other runs write to `folder`."""
    (Path(folder) / ".lock").unlink(missing_ok=True)
    lock.close()


def start_records(path: Path, steps: int, record: dict) -> None:
    """Begin metrics.jsonl with the start record, or continue it after update number `steps`.

    Records of what came later are dropped: a resumed run makes them again. So it does with the
    held-out loss after that very update, which a run that ended there may have had alone.
    """
    kept = [
        record
        for record in (read_records(path) if path.exists() else [])
        if record.get("step", 0) < steps + (record.get("event") != "eval")
    ]
    with log_errors(path), written_aside(path) as file:
        file.writelines(json.dumps(r) + "\n" for r in [*kept, record])


def append_record(path: Path, record: dict) -> None:
    """Add one line to metrics.jsonl."""
    with log_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def log_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a `RunError` that names the log."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: the log could not be written ({error.strerror})") from None


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, up to a line that a kill cut short or a disk damaged."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = dict(json.loads(line))
            operator.index(record.get("step", 0))
            records.append(record)
        except (ValueError, TypeError, RecursionError):
            break
    return records
