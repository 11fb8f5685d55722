"""The output folder of a run: who may write there, and its log, metrics.jsonl.

The folder's other contents have files of their own: weights.py the model, resume.py the
checkpoints.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from program.errors import InputError, RunError
from program.files import hold, written_aside


def check_output(folder, facts, model, save_every):
    """Raise `InputError` unless this run may write to `folder`. Nothing is written here.

    The folder must be new or hold an interrupted run with the same `facts` (see `open_run`), and
    the disk must hold the model in bf16 and, with `save_every`, its fp32 weights and two moments.
    """
    folder = Path(folder)
    check_same_run(folder, facts)
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--out {folder}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {folder}: {parent} cannot be written")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    needed, free = parameters * (14 if save_every else 2), shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"--out {folder}: {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB "
            "for the model and one resumable checkpoint"
        )


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
)


def check_same_run(folder, facts):
    """Raise `InputError` if `folder` holds a finished run, a model, or a run with other facts."""
    log = folder / "metrics.jsonl"
    for name in OVERRIDING:
        if (folder / name).exists():
            raise InputError(
                f"--out {folder}: holds {name}, which the saved model's readers would use, "
                "expected a new folder or an interrupted run's"
            )
    # A run that was killed while its model moved in has such files there, but no config.json yet.
    for name in ("config.json", *(() if log.exists() else OVERWRITTEN)):
        if (folder / name).exists():
            raise InputError(
                f"--out {folder}: holds a finished run or a model ({name}), expected a "
                "new folder or an interrupted run's"
            )
    if log.exists():
        recorded = next(iter(read_records(log)), {}).get("run")
        recorded = recorded if isinstance(recorded, dict) else {}
        for name, value in facts.items():
            if recorded.get(name) != value:
                raise InputError(
                    f"--out {folder}: holds a different run, with {name} "
                    f"{recorded.get(name)!r} where this one has {value!r}"
                )


def lock_output(folder, patience=15):
    """Make `folder` and lock out other runs until this process ends. Returns the lock.

    patience: seconds to wait for a run that was just killed.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    return hold(os.open(folder, os.O_RDONLY), folder, patience)


def start_records(path, steps, record):
    """Begin metrics.jsonl with the start record, or continue it after update number `steps`.

    Records of later updates are dropped: a resumed run makes them again.
    """
    kept = [r for r in read_records(path) if r.get("step", 0) <= steps] if path.exists() else []
    with log_errors(path), written_aside(path) as file:
        file.writelines(json.dumps(r) + "\n" for r in [*kept, record])


def append_record(path, record):
    """Add one line to metrics.jsonl."""
    with log_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def log_errors(path):
    """Turn an error of the disk into a `RunError` that names the log."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: the log could not be written ({error.strerror})") from None


def read_records(path):
    """The records of a metrics.jsonl, up to a line that a kill cut short."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    return records
