"""saving.py: models on the way, and runs that --max-steps ends and that go on."""

import json
import signal
from pathlib import Path

import pytest

import sft
from checkpoint.resume import saved_runs
from checkpoint.run_folder import exported_models, read_records
from harm import RENAME, REPLACE, assert_same_run, harmed, recipe
from program.errors import InputError
from sft import SFTConfig
from training.saving import going_on


@pytest.fixture
def flags(base, conversations, tmp_path):
    return recipe(base, conversations, tmp_path / "out")


def models(out):
    """{update: the exported model's bytes}."""
    return {
        int(place.name.removeprefix("step-")): (place / "model.safetensors").read_bytes()
        for place in exported_models(out)
    }


# ---- Models on the way


def test_a_model_on_the_way_is_that_of_a_run_that_ends_there(flags, tmp_path, uninterrupted):
    """Every file of it; and the run's end is what it is without exports."""
    assert harmed(flags | {"export_every": "5"}) == 0
    assert_same_run(flags["out"], uninterrupted)
    assert list(models(flags["out"])) == [5, 10]
    short = tmp_path / "short"
    assert harmed(flags | {"max_steps": 5, "out": str(short)}) == 0
    for path in (Path(flags["out"]) / "step-000005").iterdir():
        assert path.read_bytes() == (short / path.name).read_bytes(), path.name


def test_after_each_epoch_the_newest_stay(flags):
    """3 updates an epoch; after the last there is the result itself."""
    assert harmed(flags | {"export_every": "epoch", "keep_exports": 2}) == 0
    assert list(models(flags["out"])) == [6, 9]


def test_exports_of_a_run_that_was_killed(flags, tmp_path):
    """A folder is whole or absent, whatever moment; in the end there are the same models."""
    flags |= {"export_every": "3", "save_every": 2}
    (Path(flags["out"]) / "step-000099-notes").mkdir(parents=True)  # not ours: it stays
    expected = tmp_path / "expected"
    assert harmed(flags | {"out": str(expected)}) == 0
    for calls, at in (
        ([REPLACE], 4),  # when the files of the first move in
        ([RENAME], 2),  # when the folder takes its name, after the checkpoint of 2
        ([RENAME], 4),  # with it there, when a later one does
    ):
        assert harmed(flags, signal.SIGKILL, at, calls) == -signal.SIGKILL, (calls, at)
        for place in exported_models(flags["out"]):
            assert (place / "config.json").exists()
    assert harmed(flags, signal.SIGTERM, 1, [("sft", "append_record")]) == 128 + signal.SIGTERM
    assert harmed(flags) == 0
    assert models(flags["out"]) == models(expected)
    assert not list(Path(flags["out"]).rglob("*partial*"))
    assert (Path(flags["out"]) / "step-000099-notes").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"export_every": "0"}, "--export-every is 0, expected an integer from 1 up, or epoch"),
        ({"export_every": "epochs"}, "--export-every is epochs, expected"),
        ({"keep_exports": 2}, "--keep-exports needs --export-every"),
        ({"export_every": "2", "keep_exports": -1}, "--keep-exports is -1"),
    ],
    ids=["zero", "word", "alone", "negative"],
)
def test_bad_flags(refused, changes, message):
    """By name."""
    assert message in refused(**changes)


def test_a_folder_of_models_is_not_written_to(refused, tmp_path):
    """Models on the way without a log are someone's."""
    out = tmp_path / "other"
    (out / "step-000005").mkdir(parents=True)
    assert "holds a finished run or a model (step-000005)" in refused(out=str(out))


# ---- Going on


def test_a_larger_max_steps_goes_on_as_one_run(flags, uninterrupted, conversations):
    """With as many checkpoints kept as asked for; the held-out loss is that of one run, too."""
    flags |= {"eval_data": [str(conversations)]}
    for steps in (4, 5, 0):
        assert harmed(flags | {"max_steps": steps}) == 0
        left = [place.name for place in saved_runs(flags["out"])]
        assert left == ([f"step-{steps:06}"] if steps else [])
        assert (Path(flags["out"]) / "config.json").exists()
    records = read_records(Path(flags["out"]) / "metrics.jsonl")
    # Those at the end of the first two starts are not due in a run of 12 updates.
    assert [r["step"] for r in records if r.get("event") == "eval"] == [3, 6, 9, 12]
    kept = [json.dumps(r) + "\n" for r in records if r.get("event") != "eval"]
    (Path(flags["out"]) / "metrics.jsonl").write_text("".join(kept))
    assert_same_run(flags["out"], uninterrupted)


@pytest.mark.parametrize(
    "out, afresh",
    [("runs/demo/sft", True), ("runs/demo/./dpo", True), ("runs/sft", False), ("runs/demo", False)],
)
def test_only_the_demos_own_folder_does_not_go_on(out, afresh):
    """The demo removes it at every start, so what is said of other runs is not true of it."""
    said = going_on(SFTConfig(out=out), "the same command continues it")
    assert said.endswith("the same command continues it")
    assert said.startswith("the demo starts afresh every time; with an --out of your own") == afresh


def test_going_on_may_be_interrupted(flags, uninterrupted):
    """Then the folder holds no whole model, and is an interrupted run's."""
    assert harmed(flags | {"max_steps": 4}) == 0
    assert harmed(flags, signal.SIGTERM, 2, [("sft", "append_record")]) == 128 + signal.SIGTERM
    assert not (Path(flags["out"]) / "config.json").exists()
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_what_cannot_go_on_is_refused_with_the_reason(flags, tmp_path):
    """And with what to do; the folder stays as it is."""
    assert harmed(flags | {"max_steps": 4}) == 0

    def error(**changes):
        before = {path: path.stat().st_mtime_ns for path in Path(flags["out"]).rglob("*")}
        with pytest.raises(InputError) as caught:
            sft.main(flags | changes)
        assert {path: path.stat().st_mtime_ns for path in Path(flags["out"]).rglob("*")} == before
        return str(caught.value)

    assert "it ended after 4 updates, and a larger --max-steps goes on with it" in error(
        max_steps=4
    )
    assert "a larger --max-steps" in error(max_steps=3)
    more = error(epochs=5)
    assert "with --epochs 5 in place of 4 every learning rate would have been another" in more
    assert f"--model {flags['out']}" in more
    assert "holds a finished run" in error(lr=2e-2, epochs=5)
    assert harmed(flags) == 0
    assert "holds a finished run or a model (config.json), expected a new folder or an " in error()
    assert "holds a finished run" in error(max_steps=99)
