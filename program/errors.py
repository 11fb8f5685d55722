"""Errors that the user can do something about: one line, no traceback.

Every script runs its `main` inside `with reported():`. An `InputError` (a bad flag, file, line or
folder) becomes one line on standard error that begins with `error: `, and exit status 2. A
`RunError`, or running out of memory, does the same with status 1, an `OSError` with status 2. Any
other exception is our bug and keeps its traceback.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from tqdm import tqdm


class InputError(ValueError):
    """The user's input is wrong. The message says where, what was found, what was expected."""


class RunError(RuntimeError):
    """The run cannot continue (a loss that is not finite, a full disk). Exit status 1."""


@contextlib.contextmanager
def reported(less_memory: str = "") -> Iterator[None]:
    """Turn such an error into one line `error: …` and an exit status.

    less_memory: what the user can do when memory, as a rule a GPU's, runs out.
    """
    usable_streams()
    try:
        yield
    except BrokenPipeError:  # the reader of our output (`| head`) has closed it
        os._exit(0)
    except SystemExit as stop:  # of a run that a signal has stopped
        end(stop.code)
    except KeyboardInterrupt:  # before training; in training, `watch_signals` notes it
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        # Most errors are the same on every rank, so the other ranks wait: rank 0 prints the line
        # and exits, and torchrun ends the others meanwhile. If the error is another rank's alone,
        # that rank prints it after the wait.
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `watch_signals` would only note it
            time.sleep(5)
        if out_of_memory(error):
            found = ". ".join(one_line(error).split(". ")[:3])  # torch goes on about its allocator
            error = RunError(f"{found.rstrip('.')}. {less_memory}")
        if not isinstance(error, (InputError, RunError, OSError)):
            raise
        sys.stdout.flush()
        with tqdm.external_write_mode(sys.stderr):  # so that a progress bar is on another line
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        end(1 if isinstance(error, RunError) else 2)


def end(status: int | None) -> NoReturn:
    """End the process, without Python's shutdown.

    The threads of a process group outlive it. The shutdown would wait for groups that other ranks
    still hold; and a thread that needs the interpreter meanwhile (gloo's, to call what waits for a
    sum) would abort the process, though its work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader is gone
            stream.flush()
    os._exit(status or 0)


def usable_streams() -> None:
    """Give the program a standard input and outputs, whatever it was started with.

    One that is closed (`<&-`) becomes the null device. A terminal that cannot show a character (a
    locale of ASCII) gets a `?` instead of it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left.

    torch has `torch.OutOfMemoryError`, but its errors of the CPU's memory, of cuBLAS, NCCL and the
    driver are plain RuntimeErrors; and this file is not to import torch.
    """
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )


def one_line(error: BaseException) -> str:
    """The error's text on one line; for an `OSError`, its reason, after the path if any.

    Characters that are not printable are written as escapes: a text of the user's files may hold a
    terminal's control codes.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def amount(number: int, plural: str) -> str:
    """`1 pair`, `2 pairs`, `1 query`: a number as it is said to a user."""
    if number == 1:
        plural = plural.removesuffix("s")
        plural = f"{plural.removesuffix('ie')}y" if plural.endswith("ie") else plural
    return f"{number:,} {plural}"
