"""metrics.jsonl for those who look at TensorBoard or Weights & Biases: a process beside the run.

    sft.py ──► metrics.jsonl ──► python -m training.trackers OUT wandb ──► its web page

It only reads the file. Whatever happens to it, training goes on, and metrics.jsonl has everything.
"""

import contextlib
import importlib.util
import json
import select
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from program.errors import InputError, one_line
from training.flags import OutputFlags

TRACKERS = ("tensorboard", "wandb")  # flags, and the packages that they need
ROOT = Path(__file__).parent.parent
PATIENCE = 60  # seconds that the run waits at its end, for what is still to be sent


def check_trackers(config: OutputFlags) -> None:
    """Raise `InputError` where a tracker that the flags ask for is not installed."""
    for name in TRACKERS:
        # A mere folder of that name, in which wandb keeps its files, has a spec without an origin.
        spec = importlib.util.find_spec(name)
        if getattr(config, name) and getattr(spec, "origin", None) is None:
            raise InputError(f"--{name}: the package is not installed: pip install {name}")


def start_trackers(folder: str | Path, config: OutputFlags) -> list[subprocess.Popen]:
    """Start a process for each tracker, which reads `folder`/metrics.jsonl until this one ends.

    Returns the processes, for `finish_trackers`.
    """
    trackers = []
    for name in TRACKERS:
        if getattr(config, name):
            command = [sys.executable, "-m", "training.trackers", Path(folder).resolve(), name]
            # Its standard input closes when this process ends, however that happens; in a session
            # of its own, a Ctrl-C does not reach it before it has sent the rest.
            trackers.append(
                subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
            )
    return trackers


def finish_trackers(trackers: list[subprocess.Popen]) -> None:
    """Have the trackers send the rest, and wait for them for up to `PATIENCE` seconds each."""
    for tracker in trackers:
        tracker.stdin.close()
    for tracker in trackers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            tracker.wait(PATIENCE)


# ---- The process itself


def new_records(path: Path) -> Iterator[dict]:
    """The records of a log as they come, until standard input is closed; then the rest."""
    with open(path, "rb") as file:
        line, ended = b"", False
        while True:
            line += file.readline()
            if line.endswith(b"\n"):
                yield json.loads(line)
                line = b""
            elif ended:
                return
            else:
                ended = bool(select.select([sys.stdin], [], [], 1.0)[0])


def values_of(record: dict) -> dict:
    """The numbers of a record, by name; those of held-out data apart from those of updates."""
    prefix = "eval/" if record.get("event") == "eval" else ""
    names = [name for name in record if name not in ("step", "event")]
    return {prefix + name: record[name] for name in names if "step" in record}


def to_tensorboard(folder: Path, records: Iterator[dict]) -> None:
    """Write `folder`/tensorboard, anew at each start: the log holds every update once."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(folder / "tensorboard", flush_secs=10) as writer:
        for record in records:
            for name, value in values_of(record).items():
                writer.add_scalar(name, value, record["step"])


def to_wandb(folder: Path, records: Iterator[dict]) -> None:
    """One run of Weights & Biases for an output folder, however often the folder's run goes on.

    Project and account are wandb's own settings (`WANDB_PROJECT`, `wandb login`). wandb takes a
    step once: after a resume the updates that are made again stay as they were sent.
    """
    import wandb

    place = folder / "wandb" / "id"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        place.write_text(uuid.uuid4().hex)
    config = next(records)["config"]
    run = wandb.init(
        id=place.read_text(), name=folder.name, dir=folder, resume="allow", config=config
    )
    for record in records:
        if record.get("step", -1) >= run.step:
            run.log(values_of(record), step=record["step"])
    run.finish()


def main(folder: str, tracker: str) -> None:
    folder = Path(folder)
    records = new_records(folder / "metrics.jsonl")
    try:
        {"tensorboard": to_tensorboard, "wandb": to_wandb}[tracker](folder, records)
    except Exception as error:
        # Not logged in, or no network: a reason to tell, and none to stop a run.
        print(f"warning: --{tracker} has stopped ({one_line(error)}); training goes on",
              file=sys.stderr, flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
