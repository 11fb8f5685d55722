"""Run one program that is not to be trusted, and say whether it came to its end.

Each program has a Python process of its own, in a session of its own: with an environment of
three settings and nothing of ours, an empty folder to stand in, no open files but /dev/null and one
pipe, and what evals/confined.py puts around it. It is killed when its time is up, when it has
answered, and when it goes silent.

Success has to be proven: a random token that this process made up comes back over the pipe after
the last line of the program. Ending early, by whatever exit, proves nothing. One thing is beyond
any sandbox: a program shares its process with its tests, so one written to find the token in memory
could claim to have passed. It would harm nothing but the score of the model that wrote it.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from program.errors import InputError, RunError

CONFINED = Path(__file__).with_name("confined.py")
MEMORY = 2**30  # bytes of address space
STARTUP = 60  # seconds for Python to start and to be shut in, on a machine however busy
LAYERS = {b"n": "system call filter and namespaces", b"f": "system call filter"}


def run(program, seconds):
    """`"passed"`, `"timed out"`, or `"failed: …"` with what the program raised.

    program: Python source text, its checks included; seconds: of wall-clock time that it may take,
    without Python's start. Raises `RunError` where the process cannot be started or shut in.
    """
    return attempt(program, seconds)[0]


def check():
    """How programs are shut in here, in words; raises `InputError` where they cannot be."""
    try:
        return attempt("", STARTUP)[1]
    except RunError as error:
        raise InputError(f"{error}; programs of a model run only where they are shut in") from None


def attempt(program, seconds):
    """`run`'s verdict, and how the program was shut in."""
    token = secrets.token_hex()
    request = {
        "program": program,
        "token": token,
        "cpu_seconds": int(seconds) + 1,
        "memory_bytes": MEMORY,
    }
    with tempfile.TemporaryDirectory(prefix="program") as folder:
        child = subprocess.Popen(
            [sys.executable, "-B", CONFINED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment(),
            start_new_session=True,
        )
        try:
            try:
                child.stdin.write(json.dumps(request).encode())
                child.stdin.close()
            except BrokenPipeError:
                pass  # it ended at once, as the next line finds
            started = receive(child.stdout, 1, STARTUP)
            if started not in LAYERS:
                reason = (receive(child.stdout, 400, 1) or b"").decode(errors="replace")
                raise RunError(f"a program's process did not start: {reason or 'no reason given'}")
            answer = receive(child.stdout, 400, seconds)
        finally:
            os.killpg(child.pid, signal.SIGKILL)  # not yet waited for, so the group is still there
            child.wait()
            child.stdout.close()
    return verdict(answer, token), LAYERS[started]


def environment():
    """All that a program's process knows of ours: where the libraries of Python itself may lie.

    The same order of sets in every run, and one thread for numpy, whose others would each take
    address space.
    """
    ours = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    library_path = os.environ.get("LD_LIBRARY_PATH")
    return {**ours, "LD_LIBRARY_PATH": library_path} if library_path else ours


def receive(pipe, most, seconds):
    """The next bytes on a pipe, at most `most`; empty where it ended; None after `seconds`."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    deadline = time.monotonic() + seconds
    while not waiting.poll(1000 * max(0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            return None
    return os.read(pipe.fileno(), most)


def verdict(answer, token):
    """The words for what came over the pipe."""
    if answer is None:
        return "timed out"
    if answer == token.encode():
        return "passed"
    reason = " ".join(answer.decode(errors="replace").split())
    return f"failed: {reason or 'the process ended before its checks did'}"
