"""The output folder of a run: who may write there, and its log, metrics.jsonl.

Read and written by sft.py and dpo.py; the model and the resumable state are checkpoint.py's.
"""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from errors import InputError


def check_output(folder, run, model, save_every):
    """Raise `InputError` unless `folder` is new or holds an interrupted run with the facts `run`.

    run: what makes two runs the same, by name, compared with what metrics.jsonl says of the run
    that is there. The disk must hold the bf16 model and, with `save_every`, its fp32 weights and
    two moments. Nothing is written here.
    """
    folder = Path(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    needed = parameters * (14 if save_every else 2)
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        if (folder / name).exists():
            raise InputError(
                f"--out {folder}: holds a finished run or a model ({name}), expected a "
                "new folder or an interrupted run's"
            )
    log = folder / "metrics.jsonl"
    if log.exists():
        recorded = next(iter(read_records(log)), {}).get("run", {})
        for name, value in run.items():
            if recorded.get(name) != value:
                raise InputError(
                    f"--out {folder}: holds a different run, with {name} "
                    f"{recorded.get(name)!r} where this one has {value!r}"
                )
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--out {folder}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {folder}: {parent} cannot be written")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"--out {folder}: {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB "
            "for the model and one resumable checkpoint"
        )


def lock_output(folder, patience=15):
    """Make `folder` and hold it against other runs until this process ends; returns the lock.

    A run that was just killed may need a moment to die: `patience` seconds.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > until:
                raise InputError(f"--out {folder}: another run is writing there") from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return lock


def append_record(path, record):
    """Add one line to metrics.jsonl."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def keep_records(path, steps):
    """Drop the records of updates after `steps`, which a resumed run makes again."""
    if not path.exists():
        return
    kept = [r for r in read_records(path) if r.get("step", 0) <= steps]
    aside = path.with_name(path.name + ".partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_records(path):
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
