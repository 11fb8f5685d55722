"""program/files.py: who may write, and for how long another waits."""

import threading

import pytest

from program.errors import InputError
from program.files import hold, lock


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
