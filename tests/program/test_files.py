"""program/files.py: files are whole or as they were; who may write, and how long another waits."""

import threading

import pytest

from program.errors import InputError
from program.files import hold, lock, written_aside


def test_an_output_is_waited_for_as_long_as_patience_lasts(tmp_path):
    """A run that was just killed lets go of it a moment later; one that goes on is an error."""
    path = tmp_path / "out"
    with open(path, "w") as other, open(path, "a") as handle:
        assert lock(other)
        with pytest.raises(InputError, match=f"--out {path}: another run is writing there"):
            hold(handle, path, patience=0)
        threading.Timer(0.3, other.close).start()
        assert hold(handle, path, patience=60) is handle
        with open(path, "a") as third:
            assert not lock(third, patience=0)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    """An error half-way leaves the old content and nothing else; else the new takes its place."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), written_aside(path) as file:
        file.write("half")
        file.flush()
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with written_aside(path) as file:
        file.write("néw\n")
    assert path.read_bytes() == "néw\n".encode() and list(tmp_path.iterdir()) == [path]
