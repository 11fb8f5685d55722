"""run_folder.py: whose a folder is, who may write there, and what a finished run leaves."""

import errno
import fcntl
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint.resume import saved_runs
from checkpoint.run_folder import check_same_run, lock_output, unlock_output
from harm import LOG, assert_same_run, harmed, recipe
from program import files
from program.errors import InputError
from program.files import written_aside


@pytest.fixture
def flags(base, conversations, tmp_path):
    return recipe(base, conversations, tmp_path / "out") | {"save_every": 2}


# ---- Whose it is


@pytest.fixture(scope="module")
def stopped(base, conversations, tmp_path_factory):
    """The output folder of a run that was stopped after update 5, with a checkpoint of 4, too."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    flags = recipe(base, conversations, out) | {"save_every": 2}
    assert harmed(flags, signal.SIGTERM, 4, [LOG]) == 128 + signal.SIGTERM
    assert [place.name for place in saved_runs(out)] == ["step-000005", "step-000004"]
    return out


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"seed": 1}, {"epochs": 5}])
def test_foreign_checkpoints_are_refused(flags, stopped, tmp_path, change):
    """Without log and model the folder is still that run's; the error names what differs."""
    out, log = Path(shutil.copytree(stopped, flags["out"])), tmp_path / "log"
    (out / "metrics.jsonl").unlink()
    before, (name, value) = contents(out), *change.items()
    assert harmed(flags | change, log=log) == 2
    (line,) = [line for line in log.read_text().splitlines() if "error: " in line]
    recorded = {"lr": 1e-2, "seed": 42, "epochs": 4}[name]
    expected = f"holds a different run, with {name} {recorded!r} where this one has {value!r}"
    assert f"error: --out {out}: {expected} (in step-000005)" in line
    assert contents(out) == before


def test_an_end_before_the_newest_checkpoint_is_refused(flags, stopped, tmp_path):
    """A run that was stopped after update 5 cannot end after the fourth; it can after the fifth."""
    out, log = Path(shutil.copytree(stopped, flags["out"])), tmp_path / "log"
    before = contents(out)
    assert harmed(flags | {"max_steps": 4}, log=log) == 2
    expected = f"the run ends after 4 updates, and {out}/checkpoints/step-000005 has 5 already"
    assert f"error: --max-steps: {expected}" in log.read_text()
    assert contents(out) == before
    assert harmed(flags | {"max_steps": 5}) == 0
    assert (out / "config.json").exists()


def test_checkpoints_of_other_data_are_refused(flags, stopped, tmp_path):
    """Known by the data's content, after the tokens are there."""
    out, log = Path(shutil.copytree(stopped, flags["out"])), tmp_path / "log"
    (out / "metrics.jsonl").unlink()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(flags["data"][0]).read_text().splitlines(True)[1:]))
    before = contents(out)
    assert harmed(flags | {"data": [str(other)]}, log=log) == 2
    assert "holds a different run, with data " in log.read_text()
    assert contents(out) == before


def test_checkpoints_without_a_log_are_continued_by_their_own_run(flags, stopped, uninterrupted):
    """The same facts: the same weights in the end."""
    out = Path(shutil.copytree(stopped, flags["out"]))
    (out / "metrics.jsonl").unlink()
    assert harmed(flags) == 0
    assert (out / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()


def without_facts(out):
    for place in saved_runs(out):
        manifest = json.loads((place / "manifest.json").read_text())
        del manifest["run"]
        (place / "manifest.json").write_text(json.dumps(manifest))


def test_manifests_from_before_they_held_the_facts(flags, stopped, uninterrupted, tmp_path):
    """They are the log's, and without a log nobody's."""
    out = Path(shutil.copytree(stopped, flags["out"]))
    without_facts(out)
    log = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").unlink()
    facts = json.loads(log.splitlines()[0])["run"]
    with pytest.raises(InputError, match="a different run, with program None where"):
        check_same_run(out, facts)
    (out / "metrics.jsonl").write_bytes(log)
    check_same_run(out, facts)
    assert harmed(flags) == 0
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("content", ["", "[]", "{", "\0" * 9])
def test_a_damaged_manifest_tells_nothing(flags, stopped, tmp_path, content):
    """The other checkpoints and the log do."""
    out = Path(shutil.copytree(stopped, flags["out"]))
    (saved_runs(out)[0] / "manifest.json").write_text(content)
    (out / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"with lr 0.01 where this one has 1 \(in step-000004\)"):
        check_same_run(out, {"lr": 1})
    check_same_run(out, {"lr": 1e-2})


def test_a_checkpoint_of_a_model_that_has_changed_is_refused(flags, stopped, base, tmp_path):
    """The same path, another size: one line, and the folder stays as it is."""
    out, log = Path(shutil.copytree(stopped, flags["out"])), tmp_path / "log"
    config = json.loads((base / "config.json").read_text())
    for place in saved_runs(out):
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["run"]["model"] = str(tmp_path / "model")
        (place / "manifest.json").write_text(json.dumps(manifest))
    (out / "metrics.jsonl").unlink()
    model = Path(shutil.copytree(base, tmp_path / "model"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors = {
        name: w[:80] if "gate" in name or "up_" in name else w for name, w in tensors.items()
    }
    tensors = {n: w[:, :80].contiguous() if "down_" in n else w for n, w in tensors.items()}
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    assert harmed(flags | {"model": str(model)}, log=log) == 2
    text = log.read_text()
    assert "step-000005: does not fit the model to be trained (" in text
    assert "Traceback" not in text and len(saved_runs(out)) == 2


# ---- What a finished run leaves


def test_a_finished_run_leaves_no_checkpoints(flags, stopped, uninterrupted, tmp_path):
    """They go when the model is whole on disk, and stay with --keep-checkpoints."""
    for keep in (False, True):
        out = tmp_path / f"out-{keep}"
        shutil.copytree(stopped, out)
        (out / "checkpoints" / "partial").mkdir()
        assert harmed(flags | {"out": str(out), "keep_checkpoints": keep}) == 0
        assert_same_run(out, uninterrupted) if not keep else None
        kept = [place.name for place in saved_runs(out)]
        assert kept == (["step-000010", "step-000008"] if keep else [])
        assert (out / "checkpoints").exists() == keep
        assert not (out / ".lock").exists()


def test_a_smaller_keep_makes_room_at_once(flags, stopped, tmp_path):
    """A run that found the disk full goes on with --keep 1: the older checkpoints go first."""
    out = Path(shutil.copytree(stopped, flags["out"]))
    status = harmed(flags | {"keep": 1}, signal.SIGKILL, 1, [LOG])
    assert status == -signal.SIGKILL
    assert [place.name for place in saved_runs(out)] == ["step-000005"]


def test_what_else_is_among_the_checkpoints_stays(flags, stopped):
    """A user's own copy is not ours to remove."""
    out = Path(shutil.copytree(stopped, flags["out"]))
    (out / "checkpoints" / "mine").write_text("")
    (out / "checkpoints" / "step-backup").mkdir()
    assert harmed(flags) == 0
    assert sorted(os.listdir(out / "checkpoints")) == ["mine", "step-backup"]


# ---- Who may write


def refusing(number, writable=False):
    """`fcntl.flock` of a file system that answers so, or only where a file is not `writable`."""
    real = fcntl.flock

    def flock(handle, operation):
        mode = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE
        if not writable or mode == os.O_RDONLY:
            raise OSError(number, os.strerror(number))
        return real(handle, operation)

    return flock


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.EISDIR])
def test_a_file_system_that_locks_only_what_is_open_for_writing(tmp_path, monkeypatch, number):
    """As NFS does: the second run is refused, and let in when the first has ended."""
    monkeypatch.setattr(files.fcntl, "flock", refusing(number, writable=True))
    out = tmp_path / "out"
    lock = lock_output(out)
    with pytest.raises(InputError, match="out: another run is writing there"):
        lock_output(out, patience=0.1)
    lock.close()
    unlock_output(out, lock_output(out, patience=0.1))
    assert os.listdir(out) == []


def test_a_run_that_locked_the_folder_alone_is_seen(tmp_path):
    """As runs did before there was a lock file, on file systems that take it."""
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another run is writing there"):
        lock_output(tmp_path, patience=0.1)
    os.close(handle)
    lock = lock_output(tmp_path, patience=0.1)
    handle = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    lock.close()


def test_of_many_who_want_a_folder_one_gets_it_at_a_time(tmp_path):
    """Whoever waited for a lock file that was removed locks the new one of that name."""
    holders = []

    def work(_):
        lock = lock_output(tmp_path)
        holders.append(1)
        assert len(holders) == 1
        holders.pop()
        unlock_output(tmp_path, lock)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_all_go_on(tmp_path, monkeypatch, capsys, number):
    """Runs, and files written aside, with one warning."""
    monkeypatch.setattr(files.fcntl, "flock", refusing(number))
    files.warn_of_no_locks.cache_clear()
    locks = [lock_output(tmp_path / "out"), lock_output(tmp_path / "out")]
    with written_aside(tmp_path / "file") as file:
        file.write("text")
    assert (tmp_path / "file").read_text() == "text"
    assert capsys.readouterr().err.count("warning: a file system here has no locks") == 1
    for lock in locks:
        lock.close()


def test_another_error_of_a_lock_names_the_file(tmp_path, monkeypatch):
    """It is not taken for a lock."""
    monkeypatch.setattr(files.fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError) as caught:
        lock_output(tmp_path)
    assert caught.value.filename == str(tmp_path / ".lock")
