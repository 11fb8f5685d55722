"""trackers.py: metrics.jsonl in TensorBoard and in Weights & Biases."""

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from training import trackers
from training.trackers import finish_trackers, values_of

START = {"event": "start", "config": {"lr": 0.1}}
RECORDS = [
    {"step": 1, "loss": 3.5, "lr": 0.1},
    {"step": 2, "loss": 2.5, "lr": 0.2},
    {"event": "eval", "step": 2, "loss": 2.75, "rewards/margins": 0.5},
    {"step": 3, "loss": 1.5, "lr": 0.3},
]

# In place of the package: it writes down what it is told.
WANDB = """
import json
class Run:
    step = 0
    def log(self, values, step):
        self.step = step
        print(json.dumps([step, values]), file=self.file, flush=True)
    def finish(self):
        print("end", file=self.file, flush=True)
def init(dir, **options):
    run = Run()
    run.file = open(dir / "told", "a")
    print(json.dumps(options), file=run.file, flush=True)
    return run
"""


def write(path, records, mode="a"):
    with open(path, mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def started(tmp_path):
    """`started(tracker)`: its process, which reads the log of `tmp_path`."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    (tmp_path / "out").mkdir()
    log = tmp_path / "out" / "metrics.jsonl"
    write(log, [START, *RECORDS[:1]])
    processes, path = [], [str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]

    def start(name):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "training.trackers", tmp_path / "out", name],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            )  # fmt: skip
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_records_are_sent_as_they_come_and_the_rest_at_the_end(started, tmp_path):
    """Each once, in the log's order; what is held out under names of its own."""
    process = started("wandb")
    write(tmp_path / "out" / "metrics.jsonl", RECORDS[1:])
    finish_trackers([process])
    options, *told, end = (tmp_path / "out" / "told").read_text().splitlines()
    assert json.loads(options)["config"] == START["config"]
    assert [json.loads(line) for line in told] == [
        [1, {"loss": 3.5, "lr": 0.1}],
        [2, {"loss": 2.5, "lr": 0.2}],
        [2, {"eval/loss": 2.75, "eval/rewards/margins": 0.5}],
        [3, {"loss": 1.5, "lr": 0.3}],
    ]
    assert end == "end" and process.returncode == 0


def test_one_folder_is_one_run(started, tmp_path):
    """A run that goes on is the same one at Weights & Biases."""
    for _ in range(2):
        finish_trackers([started("wandb")])
    options = [json.loads(line) for line in (tmp_path / "out" / "told").open() if '"id"' in line]
    assert len(options) == 2 and options[0]["id"] == options[1]["id"]
    assert options[0]["resume"] == "allow" and options[0]["name"] == "out"


def test_what_fails_there_is_a_warning(started, tmp_path):
    """One line; the run itself knows nothing of it."""
    (tmp_path / "packages" / "wandb.py").write_text("raise RuntimeError('not logged in')")
    process = started("wandb")
    _, errors = process.communicate(timeout=100)
    expected = "warning: --wandb has stopped (not logged in); training goes on\n"
    assert errors.decode() == expected


def test_tensorboard_has_what_the_log_has(started, tmp_path):
    """Once, though a run that goes on starts it again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for k in (2, 4):
        write(tmp_path / "out" / "metrics.jsonl", [START, *RECORDS[:k]], "w")
        finish_trackers([started("tensorboard")])
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.5), (2, 2.5), (3, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(2, 2.75)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused(refused, monkeypatch, name):
    """Before anything starts."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    expected = f"--{name}: the package is not installed: pip install {name}"
    assert refused(**{name: True}) == expected


def test_starts_say_nothing_to_a_tracker():
    """They hold no figures."""
    assert values_of(START) == {}
