"""Damaged checkpoints and logs, full disks: what survives, and that the same command afterwards
ends with the weights of a run that nothing befell."""

import shutil
import signal
from pathlib import Path

import pytest

from checkpoint.resume import saved_runs
from checkpoint.run_folder import append_record
from harm import (
    FSYNC,
    LAST,
    LOG,
    RENAME,
    REPLACE,
    assert_same_run,
    cut_short,
    flip_byte,
    harmed,
    losses,
    recipe,
    steps,
)
from program.errors import RunError


@pytest.fixture
def flags(base, conversations, tmp_path):
    return recipe(base, conversations, tmp_path / "out")


# ---- Damaged checkpoints and logs


@pytest.fixture(scope="module")
def killed(base, conversations, tmp_path_factory):
    """The output folder of a run that was killed with checkpoints of updates 4 and 6."""
    out = tmp_path_factory.mktemp("killed") / "out"
    flags = recipe(base, conversations, out)
    assert harmed(flags | {"save_every": 2}, signal.SIGKILL, 8, [LOG]) == -signal.SIGKILL
    assert [place.name for place in saved_runs(out)] == ["step-000006", "step-000004"]
    return out


def no_json(path):
    path.write_text("[]")


def too_deep(path):
    path.write_text("[" * 100_000)


def other_step(path):
    path.write_text(path.read_text().replace('"step": 6', '"step": 7'))


def no_step(path):
    path.write_text(path.read_text().replace('"step"', '"stop"'))


@pytest.mark.parametrize(
    "name, harm",
    [
        ("__0_0.distcp", flip_byte),
        ("__0_0.distcp", cut_short),
        (".metadata", Path.unlink),
        ("manifest.json", Path.unlink),
        ("manifest.json", no_json),
        ("manifest.json", too_deep),
        ("manifest.json", other_step),
        ("manifest.json", no_step),
    ],
)
def test_damaged_checkpoint(flags, killed, uninterrupted, tmp_path, name, harm):
    """The newest checkpoint is damaged: a warning names it and the one before it is used."""
    shutil.copytree(killed, flags["out"])
    harm(Path(flags["out"]) / "checkpoints" / "step-000006" / name)
    log = tmp_path / "log"
    # One checkpoint stays, and it is the new one: the damaged one does not count.
    flags |= {"save_every": 5, "keep": 1, "keep_checkpoints": True}
    assert harmed(flags, log=log) == 0
    assert "step-000006 is damaged (" in log.read_text()
    assert "trying the one before it" in log.read_text()
    assert "continued after 4" in log.read_text()
    assert_same_run(flags["out"], uninterrupted)
    assert [place.name for place in saved_runs(flags["out"])] == ["step-000010"]


def test_damaged_newest_is_not_kept_for_a_good_one(flags, killed, tmp_path):
    """A save at an update before a damaged checkpoint's stays, whatever --keep."""
    shutil.copytree(killed, flags["out"])
    flip_byte(Path(flags["out"]) / "checkpoints" / "step-000006" / "__0_0.distcp")
    flags |= {"save_every": 5, "keep": 1}
    assert harmed(flags, signal.SIGKILL, 2, [LOG]) == -signal.SIGKILL  # after the save at 5
    assert [place.name for place in saved_runs(flags["out"])] == ["step-000005"]


def test_a_damaged_checkpoint_is_replaced_when_its_update_is_saved_again(
    flags, killed, uninterrupted, tmp_path
):
    """The run that goes on from 4 beside a damaged 6 saves a whole 6, and the next one uses it."""
    shutil.copytree(killed, flags["out"])
    flip_byte(Path(flags["out"]) / "checkpoints" / "step-000006" / "__0_0.distcp")
    # Killed in update 7, with the save at 6 done.
    assert harmed(flags | {"save_every": 2}, signal.SIGKILL, 3, [LOG]) == -signal.SIGKILL
    log = tmp_path / "log"
    assert harmed(flags, log=log) == 0
    assert "continued after 6" in log.read_text() and "is damaged" not in log.read_text()
    assert_same_run(flags["out"], uninterrupted)


def test_no_whole_checkpoint_left(flags, killed, uninterrupted, tmp_path):
    """All checkpoints are damaged: the run says so and starts again from the model."""
    shutil.copytree(killed, flags["out"])
    for place in saved_runs(flags["out"]):
        flip_byte(place / "__0_0.distcp")
    assert harmed(flags, log=tmp_path / "log") == 0
    assert "no checkpoint is whole, training starts again" in (tmp_path / "log").read_text()
    assert_same_run(flags["out"], uninterrupted)


@pytest.mark.parametrize(
    "tail", [b'{"step": 8, "lo', b"\0" * 100, b'{"step": {}}\n', b"[" * 100_000 + b"\n"]
)
def test_half_written_log(flags, killed, uninterrupted, tail):
    """A last line that was cut short, or the zeros of a lost page, do not hinder going on."""
    shutil.copytree(killed, flags["out"])
    with open(Path(flags["out"]) / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_other_number_of_ranks(flags, killed, tmp_path):
    """Two ranks go on with what one saved, with rows that do not come out even, and equal it."""
    shutil.copytree(killed, flags["out"])
    flags["micro_tokens"] = 500
    assert harmed(flags, ranks=2) == 0
    one = flags | {"out": str(tmp_path / "one")}
    shutil.copytree(killed, one["out"])
    assert harmed(one) == 0
    assert steps(flags["out"]) == list(range(1, LAST + 1))
    # AdamW's first updates divide by the gradient's size: rounding (1e-7) grows a thousandfold.
    assert losses(flags["out"]) == pytest.approx(losses(one["out"]), rel=1e-4)


# ---- Full disks


def test_full_disk_during_checkpoint(flags, killed, uninterrupted, tmp_path):
    """No room for a checkpoint: an error line, status 1; the older ones stay and serve later."""
    shutil.copytree(killed, flags["out"])
    log = tmp_path / "log"
    flags |= {"save_every": 2}
    for harm, at, calls in ((300_000, 0, []), ("full", 4, [FSYNC]), ("full", 2, [RENAME])):
        assert harmed(flags, harm, at, calls, log) == 1
        (line,) = [line for line in log.read_text().splitlines() if "error: " in line]
        assert "step-000008: the checkpoint could not be saved (" in line
        if harm == "full":
            assert f"(no space left in {flags['out']}: 0.001 GB needed, " in line
            assert "GB free; a --keep less than 2 needs less)" in line
        else:
            assert "unexpected pos" in line  # all that torch's writer says of the cause
        assert "what was saved before is untouched" in line
        names = [place.name for place in (Path(flags["out"]) / "checkpoints").iterdir()]
        assert sorted(names) == ["step-000004", "step-000006"]
        log.unlink()
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_full_disk_during_checkpoint_of_two_ranks(flags, killed, tmp_path):
    """All ranks learn of it and stop; none hangs."""
    shutil.copytree(killed, flags["out"])
    log = tmp_path / "log"
    assert harmed(flags | {"save_every": 2}, 150_000, log=log, ranks=2) == 1
    assert "the checkpoint could not be saved" in log.read_text()
    assert len(saved_runs(flags["out"])) == 2


def test_a_file_that_one_rank_alone_cannot_read_again(flags, tmp_path):
    """Rank 1 fails at the digest of its file: there is no checkpoint, and both ranks stop."""
    log, digest = tmp_path / "log", [("checkpoint.resume", "digest")]
    assert harmed(flags | {"save_every": 2}, "full", 1, digest, log, ranks=2, struck=1) == 1
    assert "step-000002: the checkpoint could not be saved" in log.read_text()
    assert list((Path(flags["out"]) / "checkpoints").iterdir()) == []


def test_full_disk_during_the_last_save(flags, killed, uninterrupted, tmp_path):
    """No room for the model: an error line, status 1, nothing half made; later the run ends."""
    shutil.copytree(killed, flags["out"])
    log = tmp_path / "log"
    for harm, at, calls in ((50_000, 0, []), ("full", 2, [FSYNC]), ("full", 7, [REPLACE])):
        assert harmed(flags, harm, at, calls, log) == 1
        reason = "no space left in " if harm == "full" else "File too large); "
        assert f"the model could not be saved ({reason}" in log.read_text()
        log.unlink()
        assert not (Path(flags["out"]) / "config.json").exists()
        assert not (Path(flags["out"]) / "hf.partial").exists()
        assert len(saved_runs(flags["out"])) == 2
    assert harmed(flags) == 0
    assert_same_run(flags["out"], uninterrupted)


def test_full_disk_for_the_log():
    """The log's own error names it."""
    with pytest.raises(RunError, match="/dev/full: the log could not be written .No space left"):
        append_record(Path("/dev/full"), {"step": 1})
