"""disk.py: what a run needs, and what is said of a full disk."""

import errno
import os
import shutil

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from checkpoint import disk
from checkpoint.disk import check_space, explained
from program.errors import InputError

MODEL = torch.nn.ParameterList([torch.zeros(700_000), torch.zeros(300, 1000)])  # a million weights


@pytest.fixture
def free(monkeypatch, tmp_path):
    """`free(bytes)` sets what the disk has."""

    def set_free(size):
        usage = shutil.disk_usage(tmp_path)._replace(free=size)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)

    return set_free


@pytest.mark.parametrize("checkpoints", [1, 2, 3])
def test_room_for_checkpoints_and_model(tmp_path, free, checkpoints):
    """12 bytes a weight for each checkpoint, 2 for the model; one byte less is refused."""
    out = tmp_path / "a" / "b"
    free(12_000_000 * checkpoints + 2_000_000)
    check_space(out, MODEL, checkpoints)
    free(12_000_000 * checkpoints + 1_999_999)
    with pytest.raises(InputError) as caught:
        check_space(out, MODEL, checkpoints)
    needed = {1: "0.014", 2: "0.026", 3: "0.038"}[checkpoints]
    assert f"--out {out}: {needed} GB free, expected {needed} GB for the model" in str(caught.value)
    assert ("a smaller --keep needs less" in str(caught.value)) == (checkpoints > 1)


def test_room_for_models_on_the_way(tmp_path, free):
    """2 bytes a weight each; those of an interrupted run are there already."""
    free(12_000_000 + 4 * 2_000_000)
    check_space(tmp_path, MODEL, 1, 3)
    free(12_000_000 + 4 * 2_000_000 - 1)
    with pytest.raises(InputError, match="for the model and 3 on the way .--keep-exports keeps"):
        check_space(tmp_path, MODEL, 1, 3)
    (tmp_path / "step-000005").mkdir()
    (tmp_path / "step-000005" / "model.safetensors").write_bytes(bytes(2_000_000))
    free(12_000_000 + 3 * 2_000_000)
    check_space(tmp_path, MODEL, 1, 3)


def test_room_for_adapters(tmp_path, free):
    """Alone they take 4 bytes a number, beside the model and on the way; merged, none of their own.

    A weight of which NF4 keeps half a byte is written in two.
    """
    halves = {"lora_A": torch.zeros(100, 7), "lora_B": torch.zeros(100, 3)}  # a thousand numbers
    model = torch.nn.ModuleDict({"adapted": torch.nn.ParameterDict(halves)})
    for name, weight in (
        ("plain", torch.zeros(600_000)),
        ("packed", torch.zeros(200_000, dtype=torch.uint8)),
    ):
        model.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    size, adapters, checkpoint = 2_000_000 + 4_000, 4_000, 12_000
    for alone, export in ((True, adapters), (False, size)):
        free(size + checkpoint + 3 * export)
        check_space(tmp_path, model, 1, 3, alone)
        free(size + checkpoint + 3 * export - 1)
        with pytest.raises(InputError, match="for the model and 3 on the way"):
            check_space(tmp_path, model, 1, 3, alone)


def test_what_an_interrupted_run_holds_counts_as_free(tmp_path, free):
    """Its checkpoints, whole or half made, and its half made model; nothing else."""
    for name in ("checkpoints/step-000002", "checkpoints/partial", "hf.partial", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(bytes(1_000_000))
    free(11_000_000)
    check_space(tmp_path, MODEL, 1)
    free(10_999_999)
    with pytest.raises(InputError, match="0.011 GB free and 0.003 GB in its checkpoints, expected"):
        check_space(tmp_path, MODEL, 1)


def raised(*errors):
    """The last of some errors, each raised while the one before it was handled."""
    for error in errors:
        try:
            raise error
        except BaseException as caught:
            last = caught
    return last


def nested(first, second):
    try:
        try:
            raise first
        except BaseException:
            raise second  # noqa: B904
    except BaseException as caught:
        return caught


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [
    FULL,
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "file"),
    CheckpointException("write", {1: _wrap_exception(raised(FULL))}),
    CheckpointException("write", {0: _wrap_exception(nested(FULL, RuntimeError("pos")))}),
])  # fmt: skip
def test_a_full_disk_is_told_plainly(tmp_path, free, error):
    """Wherever in the exception the disk's error is: folder, what is needed and what is free."""
    free(34_560_000)
    text = str(explained(error, tmp_path, 120_000_000, "; advice"))
    expected = f"no space left in {tmp_path}: 0.120 GB needed, 0.035 GB free; advice"
    assert text == expected


def test_a_full_disk_is_told_where_the_cause_is_lost(tmp_path, free):
    """An exception that came from another rank has lost its cause: then the free space decides."""
    lost = CheckpointException(
        "write", {1: _wrap_exception(raised(RuntimeError("unexpected pos")))}
    )
    free(119_999_999)
    assert "no space left in" in str(explained(lost, tmp_path, 120_000_000))
    free(120_000_001)
    assert str(explained(lost, tmp_path, 120_000_000)) == "unexpected pos"


def test_another_error_of_the_disk_is_itself(tmp_path):
    """The error, not the traceback in which torch wraps it."""
    other = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    wrapped = CheckpointException("write", {0: _wrap_exception(nested(other, RuntimeError("pos")))})
    assert explained(wrapped, tmp_path, 0) is other


def test_the_reason_is_told_where_the_folder_could_not_be_made(tmp_path):
    """Then there is no folder to ask for its free space; the disk below has it."""
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert explained(refused, tmp_path / "a" / "b") is refused
