"""What the user got wrong, said in one line.

Every script runs its `main` inside `with reported():`. An `InputError` (a bad flag, file, line or
folder) becomes one line on standard error that begins with `error: `, and exit status 2. Anything
else but a `RunError` is a bug of ours and keeps its traceback.
"""

import contextlib
import os
import signal
import sys
import time

from tqdm import tqdm


class InputError(ValueError):
    """The user's input is wrong; the message says where, what was found and what was expected."""


class RunError(RuntimeError):
    """A run cannot go on (a loss that is not finite, a full disk); exit status 1."""


@contextlib.contextmanager
def reported():
    """Turn an `InputError`, or a file the system refuses, into `error: …` and exit status 2."""
    try:
        yield
    except BrokenPipeError:  # whoever read our output (`| head`) has had enough
        os._exit(0)
    except KeyboardInterrupt:  # before training began; it stops in an orderly way (parallel.py)
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        # Most errors strike every rank alike, and one that is rank 0's alone breaks what connects
        # it to the others: rank 0 speaks, and torchrun ends the others while they wait. An error
        # that is another rank's alone is said after the wait.
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training had it noted, not obeyed
            time.sleep(5)
        if not isinstance(error, (InputError, RunError, OSError)):
            raise
        sys.stdout.flush()
        with tqdm.external_write_mode(sys.stderr):  # a progress bar would share the line
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        # Not sys.exit: at its end Python would wait for process groups that other ranks still hold.
        os._exit(1 if isinstance(error, RunError) else 2)


def one_line(error):
    """The error's text without line breaks; an `OSError` as `path: reason`."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
