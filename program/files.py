"""Files that last: written whole or not at all, locked against other runs, known by a digest.

A write that is killed leaves the old state or the new one, never a half. (While one folder takes
the place of another there is a moment without either.)
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from program.errors import InputError

# What a file system without locks answers.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextlib.contextmanager
def written_aside(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A new file that takes the name `path` when the block ends; after a failure nothing is left.

    mode: "w" for UTF-8 text, "wb" for bytes. Of several processes one writes at a time.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with open_locked(partial):
        try:
            with open(partial, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def folder_written_aside(path: str | Path) -> Iterator[Path]:
    """A new folder that takes the name `path`, and the place of what stood there, at the end."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
        fsync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fsync(path: str | Path) -> None:
    """Make a file, or the renames inside a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def digest(path: str | Path) -> list:
    """[bytes, SHA-256] of a file."""
    sha, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
            size += len(block)
    return [size, sha.hexdigest()]


def whole_lines(path: str | Path) -> list[bytes]:
    """The lines of a file, as bytes; a last one that a kill cut short is left out."""
    content = Path(path).read_bytes()
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def read_object(path: str | Path) -> dict:
    """The JSON object that a file holds; raises `InputError` for any other content."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def lock(handle: IO | int, patience: float = math.inf) -> bool:
    """Lock an open file until it is closed; False where another process holds it.

    patience: seconds to wait for that process. Some file systems, NFS among them, refuse to lock
    what is not open for writing. Where there are no locks at all, a warning says so, and all go on.
    """
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn_of_no_locks()
            return True


@functools.cache  # once
def warn_of_no_locks() -> None:
    if int(os.environ.get("RANK", 0)) == 0:  # of a run's processes, one
        print(
            "warning: a file system here has no locks: start no other program that writes to the "
            "same places before this one has ended",
            file=sys.stderr,
            flush=True,
        )


def open_locked(path: str | Path, patience: float = math.inf) -> IO | None:
    """The file `path`, open and locked; its holder renames or unlinks it, then closes it.

    None where another process holds it for longer than `patience` seconds.
    """
    while True:
        file = open(path, "ab")
        try:
            if not lock(file, patience):
                file.close()
                return None
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            file.close()
            raise OSError(error.errno, error.strerror, str(path)) from None
        file.close()  # gone while we waited: others may hold a new file of that name


def hold(handle: IO | int, path: str | Path, patience: float = 15) -> IO | int:
    """Hold an output, `path`, until this process ends; raises `InputError` where another run does.

    A run that was just killed may need a moment to die: `patience` seconds.
    """
    if not lock(handle, patience):
        raise InputError(f"--out {path}: another run is writing there")
    return handle


def hold_file(file: str | Path, path: str | Path, patience: float = 15) -> IO:
    """Hold an output, `path`, as `hold` does, by locking `file`, which is made for that."""
    handle = open_locked(file, patience)
    if handle is None:
        raise InputError(f"--out {path}: another run is writing there")
    return handle
