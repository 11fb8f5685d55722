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
        # The text of a data file: a colour, a NUL, a right-to-left mark, half a character, a path.
        (
            "raise errors.InputError('role is \\x1b[31mé\\0\\u202e\\ud800👧')",
            2,
            "error: role is \\x1b[31mé\\x00\\u202e\\ud800👧\n",
        ),
        ("open('no\\n\\x1bsuch')", 2, "error: no \\x1bsuch: No such file or directory\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_an_error_is_one_line_after_what_was_printed(statement, status, line):
    """User's input: status 2; a run that cannot go on: 1; Ctrl-C: 130 and no line."""
    done = ended(statement)
    assert (done.returncode, done.stderr) == (status, line)
    assert done.stdout == "before\n" or status == 130  # Ctrl-C waits for nothing


@pytest.mark.parametrize(
    "statement, text",
    [
        # As torch words it on a GPU; a real one of the CPU's; and what libraries say.
        (
            "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\\nX')",
            "CUDA out of memory. Tried to allocate 2.00 GiB. X",
        ),
        ("torch.empty(1 << 60)", "can't allocate memory: you tried to allocate"),
        ("raise RuntimeError('CUBLAS_STATUS_ALLOC_FAILED when')", "CUBLAS_STATUS_ALLOC_FAILED"),
        ("raise MemoryError('Unable to allocate 9 TiB')", "Unable to allocate 9 TiB"),
    ],
    ids=["gpu", "cpu", "cublas", "numpy"],
)
def test_no_memory_left_is_one_line_that_says_what_to_change(statement, text):
    """Status 1, whichever library ran out."""
    code = "from program import errors\nimport torch\nwith errors.reported('less: x'):\n    "
    code += statement
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert line.startswith("error: ") and text in line and line.endswith(" less: x")


def test_a_bug_keeps_its_traceback():
    """Anything else is ours, and must be found."""
    done = ended("{}['key']")
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'key'\n")
    assert "Traceback" in done.stderr and "error: " not in done.stderr


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_closed_streams_are_no_error(closed):
    """`<&-`, `>&-`, `2>&-`: nothing is there to read, and what is printed is lost, no more."""
    code = (
        "from program import errors\n"
        "with errors.reported():\n"
        "    import sys, tqdm\n"
        "    assert sys.stdin.read() == ''\n"
        "    for _ in tqdm.tqdm([1]): print('out')\n"
        "    print('err', file=sys.stderr)\n"
        "    raise errors.InputError('bad')"
    )
    signs = " ".join(f"{k}{'<' if k == '0' else '>'}&-" for k in closed)
    command = ["sh", "-c", f'"$0" -c "$1" {signs}', sys.executable, code]
    pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, timeout=60, **pipes)
    assert done.returncode == 2
    assert done.stdout == ("" if "1" in closed else "out\n")
    assert ("err\nerror: bad\n" in done.stderr) == ("2" not in closed)


def test_a_terminal_of_ascii_shows_what_it_can():
    """A character that the encoding lacks becomes a question mark, in output and in errors."""
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = (
        "from program import errors\n"
        "with errors.reported():\n"
        "    print('caf\\xe9', '\\ud800')\n"
        "    raise errors.InputError('na\\xefve')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ascii_only, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, b"caf? ?\n")
    assert done.stderr == b"error: na\\xefve\n"  # Python's own way for standard error


def test_a_reader_that_has_had_enough_is_no_error():
    """As with `| head`: what it did not take is dropped in silence."""
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = ended("for _ in range(9999): print('more')", stdout=reader.stdin)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_thread_that_needs_python_does_not_abort_a_run_that_is_done():
    """Gloo's thread calls Python after `leave`: status 0. (After a plain exit it is SIGABRT.)"""
    code = (
        "import sys, time, torch, torch.distributed as dist\n"
        "from program.ranks import leave, start\n"
        "start()\n"
        "group = dist.group.WORLD\n"
        "sum = dist.all_reduce(torch.ones(5), async_op=True)\n"
        "def late(_): time.sleep(1)\n"  # lets go of the interpreter, and wants it back
        "sum.get_future().then(late)\n"
        "class Slow:\n"  # a shutdown that takes longer
        "    def __del__(self, sleep=time.sleep): sleep(2)\n"
        "sys.modules['slow'] = Slow()\n"
        "print('done')\n"
        "leave()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"done\n"), run.stderr
