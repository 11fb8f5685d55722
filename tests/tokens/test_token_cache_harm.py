"""The token cache where files are cut short, builders are killed or race, or the disk is full."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
from harm import FORKS, cut_short
from program import files
from program.errors import InputError, RunError
from tokens import token_cache
from tokens.records import encode_conversation


@pytest.fixture
def cached(base, conversations, tmp_path):
    """A data file, and a function that reads it through its token cache."""
    path = Path(shutil.copy(conversations, tmp_path))

    def read(fallback=None):
        documents = data.Documents([path], base, 100, encode_conversation, fallback)
        return np.concatenate([ids for ids, _ in documents.sequences(range(len(documents)))])

    return path, read


@pytest.mark.parametrize("harm", [cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["tokens", "trained", "index"])
def test_damaged_cache(cached, name, harm, capsys):
    """A cache of which any file is cut short or missing is made again."""
    path, read = cached
    expected = read()
    (cache,) = path.parent.glob("*.tokens-*")
    harm(cache / name)
    assert np.array_equal(read(), expected)
    assert "is damaged" in capsys.readouterr().err
    assert np.array_equal(read(), expected)
    assert capsys.readouterr().err == ""
    assert sorted(path.parent.iterdir()) == [path, cache]


def test_killed_builder(cached):
    """What a killed builder left behind is swept away by the next."""
    path, read = cached
    expected = read()
    (cache,) = path.parent.glob("*.tokens-*")
    cache.rename(f"{cache}.partial")
    Path(f"{cache}.lock").touch()
    assert np.array_equal(read(), expected)
    assert sorted(path.parent.iterdir()) == [path, cache]


def test_builders_at_once(cached, base):
    """Two processes that start at once make one cache, and both can read it."""
    path, read = cached
    builders = [FORKS.Process(target=build, args=(path, base)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
        assert builder.exitcode == 0
    (cache,) = path.parent.glob("*.tokens-*")
    assert sorted(path.parent.iterdir()) == [path, cache]
    assert len(read()) > 0


def build(path, base):
    data.Documents([path], base, 100, encode_conversation)


def test_data_folder_that_cannot_be_written(cached, tmp_path, monkeypatch):
    """The cache then stands in the output folder; without one, an error says so."""
    path, read = cached

    def read_only(name, mode="r", *rest, **options):
        if mode != "r" and Path(name).parent == path.parent:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return open(name, mode, *rest, **options)

    monkeypatch.setattr(files, "open", read_only, raising=False)
    with pytest.raises(InputError, match="Read-only file system, and the token cache must stand"):
        read()
    assert list(path.parent.iterdir()) == [path]
    tokens = read(tmp_path / "out")
    (cache,) = (tmp_path / "out").iterdir()
    assert cache.name.startswith("conversations.jsonl.tokens-")
    monkeypatch.undo()
    assert np.array_equal(read(), tokens)


def test_full_disk_for_the_cache(cached, monkeypatch):
    """A full disk gives an error that names the cache, and leaves nothing half made."""
    path, read = cached

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache, "fsync", full)
    with pytest.raises(RunError, match="conversations.jsonl.tokens-.*No space left on device"):
        read()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_builder(base, conversations, tmp_path, number):
    """When a run is killed or interrupted while all cores tokenise, its workers end quietly."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(conversations.read_bytes() * 5000)
    command = [sys.executable, data.__file__, "--model", base, "--data", path]
    with open(tmp_path / "log", "w") as log:
        # A session of its own, to be interrupted as a terminal does it: all processes at once.
        builder = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 60
    while not any(p.stat().st_size for p in tmp_path.glob("*.partial/tokens")):
        assert builder.poll() is None and time.monotonic() < until, "no worker delivered anything"
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(builder.pid, number)
    else:
        builder.kill()
    assert builder.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    until = time.monotonic() + 10
    while sessions(builder.pid):
        assert time.monotonic() < until, "workers stay behind"
        time.sleep(0.05)
    assert "Traceback" not in (tmp_path / "log").read_text()
    if number == signal.SIGINT:
        assert {p.name for p in tmp_path.iterdir()} == {"large.jsonl", "log"}


def sessions(leader):
    """The living processes of `leader`'s session, without `leader`."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if rest[0] != "Z" and int(rest[3]) == leader and pid != leader:
            living.append(pid)
    return living
