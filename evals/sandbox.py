"""Run one untrusted program in a sandbox, and say whether it ran to its end.

Each program has a Python process of its own, in a session of its own. The process gets at most
three environment variables, an empty working folder, no open files but /dev/null and one pipe, and
the limits and filters of evals/confined.py. It is killed when its time is up, when it has answered,
and when its pipe closes.

A program has to prove its success: after its last line the process sends a random token, made up
here, over the pipe. A program that ends early, with whatever exit status, proves nothing. One thing
is beyond any sandbox: a program shares its process with its tests, so a program written to find the
token in memory could claim to have passed. It would harm nothing but the score of the model that
wrote it.
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
from typing import BinaryIO

from program.errors import InputError, RunError

CONFINED = Path(__file__).with_name("confined.py")
MEMORY = 2**30  # bytes of address space
STARTUP = 60  # seconds for Python to start and enter the sandbox, also on a busy machine
LAYERS = {b"n": "system call filter and namespaces", b"f": "system call filter"}


def run(program: str, seconds: float) -> str:
    """`"passed"`, `"timed out"`, or `"failed: …"` with what the program raised.

    program: Python source text, with its tests. seconds: wall-clock time that the program may take,
    without the start of Python. Raises `RunError` if the process cannot start or enter the sandbox.
    """
    return attempt(program, seconds)[0]


def check() -> str:
    """The kind of sandbox that this machine has, in words. Raises `InputError` if it has none."""
    try:
        return attempt("", STARTUP)[1]
    except RunError as error:
        raise InputError(f"{error}; a model's programs run only in a sandbox") from None


def attempt(program: str, seconds: float) -> tuple[str, str]:
    """The verdict of `run`, and the kind of sandbox."""
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
                pass  # the process ended at once; `receive` will say so
            started = receive(child.stdout, 1, STARTUP)
            if started not in LAYERS:
                reason = (receive(child.stdout, 400, 1) or b"").decode(errors="replace")
                raise RunError(f"a program's process did not start: {reason or 'no reason given'}")
            answer = receive(child.stdout, 400, seconds)
        finally:
            os.killpg(child.pid, signal.SIGKILL)  # before `wait`, while the group still exists
            child.wait()
            child.stdout.close()
    return verdict(answer, token), LAYERS[started]


def environment() -> dict[str, str]:
    """The environment of a program's process: of ours it has only where libraries may lie.

    Sets have the same order in every run. numpy has one thread: each more takes address space.
    """
    ours = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    library_path = os.environ.get("LD_LIBRARY_PATH")
    return {**ours, "LD_LIBRARY_PATH": library_path} if library_path else ours


def receive(pipe: BinaryIO, max_bytes: int, seconds: float) -> bytes | None:
    """The next bytes on a pipe, at most `max_bytes`. Empty if it was closed; None if time is up."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    deadline = time.monotonic() + seconds
    while not waiting.poll(1000 * max(0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            return None
    return os.read(pipe.fileno(), max_bytes)


def verdict(answer: bytes | None, token: str) -> str:
    """The verdict, in words, for what came over the pipe."""
    if answer is None:
        return "timed out"
    if answer == token.encode():
        return "passed"
    reason = " ".join(answer.decode(errors="replace").split())
    return f"failed: {reason or 'the process ended before its checks did'}"
