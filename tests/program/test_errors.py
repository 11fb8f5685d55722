"""errors.py: what ends a program, as its caller sees it: one line, exit status, no traceback."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT


def ended(statement, **options):
    """A small program of ours that ends with this statement; its output and status."""
    code = "from program import errors\nwith errors.reported():\n    print('before')\n    "
    code += statement
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    # What was printed must come out although the program ends without Python's own clean-up.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=buffered, text=True, timeout=60, **pipes
    )


@pytest.mark.parametrize(
    "statement, status, line",
    [
        ("raise errors.InputError('flag\\n  is bad')", 2, "error: flag is bad\n"),
        ("raise errors.RunError('loss nan')", 1, "error: loss nan\n"),
        ("open('no/such')", 2, "error: no/such: No such file or directory\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_an_error_is_one_line_after_what_was_printed(statement, status, line):
    """User's input: status 2; a run that cannot go on: 1; Ctrl-C: 130 and no line."""
    done = ended(statement)
    assert (done.returncode, done.stderr) == (status, line)
    assert done.stdout == "before\n" or status == 130  # Ctrl-C waits for nothing


def test_a_bug_keeps_its_traceback():
    """Anything else is ours, and must be found."""
    done = ended("{}['key']")
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'key'\n")
    assert "Traceback" in done.stderr and "error: " not in done.stderr


def test_a_reader_that_has_had_enough_is_no_error():
    """As with `| head`: what it did not take is dropped in silence."""
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = ended("for _ in range(9999): print('more')", stdout=reader.stdin)
    assert (done.returncode, done.stderr) == (0, "")
