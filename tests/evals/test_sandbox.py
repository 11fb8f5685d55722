"""evals/sandbox.py and evals/confined.py: only a program that runs to its end passes; a hostile one
harms nothing and blocks nothing, with namespaces and without."""

import errno
import os
import re
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from evals import confined, sandbox
from program.errors import InputError, RunError

WITHOUT_NAMESPACES = """
import sys
sys.path.insert(0, {folder!r})
import confined
confined.enter_namespaces = lambda libc, channel: False
confined.main()
"""


@pytest.fixture(params=["namespaces", "filter alone"])
def run(request, tmp_path, monkeypatch):
    """`sandbox.run` with all that this kernel allows, and with the filter alone."""
    if request.param == "filter alone":
        script = tmp_path / "without_namespaces.py"
        script.write_text(WITHOUT_NAMESPACES.format(folder=str(sandbox.CONFINED.parent)))
        monkeypatch.setattr(sandbox, "CONFINED", script)
        assert sandbox.check() == "system call filter"
    elif "namespaces" not in sandbox.check():
        pytest.skip("this kernel allows no namespaces")
    return lambda program, seconds=10: sandbox.run(program, seconds)


def test_what_runs_to_its_end_passes(run):
    """Right programs with modules, threads, much output and exit handlers."""
    assert run("assert sum(range(5)) == 10") == "passed"
    assert run("import math, typing, collections, re, hashlib; print('x' * 10**6)") == "passed"
    assert run("import numpy; assert (numpy.eye(9) @ numpy.eye(9)).sum() == 9") == "passed"
    assert run("import threading as t; a = t.Thread(target=int); a.start(); a.join()") == "passed"
    assert run("import atexit, time; atexit.register(time.sleep, 99)") == "passed"
    assert (
        run("assert __name__ != '__main__'" + "\n" * 200_000) == "passed"
    )  # more than a pipe holds


def test_what_raises_fails_and_says_why(run):
    """The verdict holds the type and the message of what the program raised."""
    assert run("assert 1 == 2, 'no'") == "failed: AssertionError: no"
    assert run("def f(:").startswith("failed: SyntaxError")
    assert run("input()").startswith("failed: EOFError")
    assert run("raise KeyboardInterrupt") == "failed: KeyboardInterrupt:"
    assert run("class E(Exception):\n __str__ = None\nraise E").startswith("failed")
    assert run("open('data.txt')").startswith("failed: FileNotFoundError")  # an empty folder


@pytest.mark.parametrize(
    "ending",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "exit()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "import os\nfor fd in range(64):\n try: os.close(fd)\n except OSError: pass",
        "import os; os.closerange(0, 64); os._exit(0)",
        "import os\nfor fd in range(64):\n try: os.write(fd, b'passed')\n except OSError: pass",
        "import os; os.write = lambda *args: 0",
    ],
)
def test_an_early_end_is_no_success(run, ending):
    """Whatever the exit status, only the token proves success."""
    assert run(ending, 1) != "passed"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "import time; time.sleep(99)",
        "9**9**9",  # in C, without a look at signals
        "import signal as s\nfor n in range(1, 32):\n"
        " try: s.signal(n, s.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: pass",
        "import os; os.read(os.pipe()[0], 1)",
        "while True: print('x' * 10**6)",
        "import sys, time\nclass E(Exception):\n def __str__(self): time.sleep(99)\nraise E",
    ],
)
def test_what_does_not_end_is_killed(run, program):
    """Programs that ignore signals, sleep, block or print for ever are killed in time."""
    began = time.monotonic()
    assert run(program, 0.3) == "timed out"
    assert time.monotonic() - began < 30  # of 99 seconds or for ever, on a machine however busy


def test_memory_has_a_limit(run):
    """A program that takes too much memory fails; it does not fill the machine."""
    assert run("x = bytearray(10**10)").startswith("failed: MemoryError")
    assert run("x = []\nwhile True: x.append(bytes(10**7))").startswith("failed: MemoryError")
    assert run("import mmap; mmap.mmap(-1, 2 * 10**9)") != "passed"


def test_files_stay_as_they_are(run, tmp_path):
    """No file is made, changed or removed, in the program's folder or outside, by any call."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o640)
    before, beside = victim.stat(), sorted(tmp_path.iterdir())
    programs = [
        "open({path!r}, 'w')", "open({path!r}, 'a').write('x')", "open({path!r}, 'r+b')",
        "os.remove({path!r})", "os.truncate({path!r}, 0)", "os.rename({path!r}, {path!r} + '2')",
        "os.chmod({path!r}, 0)", "os.chown({path!r}, 1, 1)", "os.utime({path!r}, (0, 0))",
        "os.link({path!r}, {path!r} + '2')", "os.symlink('x', {path!r} + '2')",
        "os.mkdir({path!r} + '2')", "os.mkfifo({path!r} + '2')", "shutil.rmtree({folder!r})",
        "os.setxattr({path!r}, 'user.x', b'1')", "os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "os.open({folder!r}, os.O_TMPFILE | os.O_WRONLY)", "open('/proc/self/oom_score_adj', 'w')",
        "open('own', 'w')", "tempfile.mkdtemp(dir='.')", "os.memfd_create('x')",
        "open('/dev/shm/x', 'w')", "open('big', 'wb').truncate(10**12)",
        "fcntl.flock(open({path!r}), fcntl.LOCK_EX)",
    ]  # fmt: skip
    for program in programs:
        source = program.format(path=str(victim), folder=str(tmp_path))
        answer = run("import fcntl, os, shutil, tempfile\n" + source)
        assert answer.startswith("failed: ") and "NameError" not in answer, (source, answer)
    after = victim.stat()
    assert victim.read_text() == "precious" and sorted(tmp_path.iterdir()) == beside
    assert stat.S_IMODE(after.st_mode) == 0o640 and after.st_nlink == 1
    assert (after.st_mtime_ns, after.st_uid) == (before.st_mtime_ns, before.st_uid)


def test_no_other_process_is_started(run):
    """A fork bomb ends at its first fork; no daemon outlives its program."""
    for program in (
        "import os\nwhile True: os.fork()",
        "import os\nif os.fork() == 0: os.setsid()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; m.Process(target=int).start()",
        "import os; assert os.system('true') == 0",
        "import os; os.setsid()",
        "import os; os.setpgid(0, 0)",
    ):
        assert run(program).startswith("failed: "), program


def test_no_other_process_is_touched(run):
    """Not by signals, its own or the kernel's, and not through limits, priorities or memory."""
    bystander = subprocess.Popen(["sleep", "99"])
    try:
        for program in (
            "os.kill({pid}, 9)",
            "os.kill(os.getppid(), 9)",
            "os.kill(-1, 9)",
            "os.killpg(0, 9)",
            "os.pidfd_open({pid})",
            "signal.pthread_kill(threading.get_ident(), 9)",
            "r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, {pid})",
            "resource.prlimit({pid}, resource.RLIMIT_CPU, (0, 0))",
            "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
            "os.sched_setaffinity({pid}, {{0}})",
            "assert ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0",
        ):
            modules = "import ctypes, fcntl, os, resource, signal, threading\n"
            answer = run(modules + program.format(pid=bystander.pid))
            assert answer.startswith("failed: ") and "NameError" not in answer, (program, answer)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_no_network(run):
    """No socket of any kind can be made, and no connection reaches a server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        for program in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}))",
            "import socket; socket.socket(socket.AF_UNIX)",
            "import socket; socket.socketpair()",
            f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}')",
        ):
            assert run(program).startswith("failed: "), program
        with pytest.raises(BlockingIOError):
            server.accept()


def test_nothing_of_ours_is_handed_on(run, monkeypatch):
    """A program sees no variable, no open file and no module of ours."""
    monkeypatch.setenv("SECRET", "xyzzy")
    assert run("import os; assert 'xyzzy' not in str(os.environ)") == "passed"
    with open(os.devnull) as file:
        os.set_inheritable(file.fileno(), True)
        assert run(f"import os; os.fstat({file.fileno()})").startswith("failed: OSError")
    assert run("import sandbox").startswith("failed: ModuleNotFoundError")
    assert run("import harness").startswith("failed: ModuleNotFoundError")


def test_a_process_outside_the_sandbox_is_no_verdict(tmp_path, monkeypatch):
    """A process outside the sandbox is an error with its reason, never a verdict."""
    script = tmp_path / "fails.py"
    monkeypatch.setattr(sandbox, "CONFINED", script)
    for source, reason in (("print('!no filter', end='')", "no filter"), ("", "no reason given")):
        script.write_text(source)
        with pytest.raises(RunError, match=reason):
            sandbox.run("pass", 1)
        with pytest.raises(InputError, match=reason):
            sandbox.check()


def outcome(steps, call, arguments=(), audit=None):
    """What a filter answers to a system call, by executing its instructions one by one."""
    data = {0: call, 4: audit} | {16 + 8 * n: value for n, value in enumerate(arguments)}
    position, word = 0, None
    while True:
        code, if_true, if_false, constant = steps[position]
        position += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            word = data[constant]
        else:
            holds = {0x15: word == constant, 0x35: word >= constant, 0x45: word & constant}[code]
            position += if_true if holds else if_false


@pytest.mark.parametrize("machine", confined.MACHINES)
def test_filter_step_by_step(machine):
    """Exactly the calls to be refused are refused; reading and threads are allowed."""
    column, audit = confined.MACHINES[machine]
    steps = confined.filter_steps(machine)
    assert all(0 <= jump < 256 for step in steps for jump in step[1:3]) and len(steps) < 4096
    refused = {numbers[column] for numbers in confined.REFUSED.values()}
    looked_at = {numbers[column] for numbers in confined.LOOKED_AT.values()}
    for call in range(424):
        if call not in looked_at:
            expected = 0x00050000 | errno.EACCES if call in refused else 0x7FFF0000
            assert outcome(steps, call, audit=audit) == expected, call
    for call in (424, 435, 2**30 + 59, 2**32 - 1):  # io_uring, clone3, x32
        assert outcome(steps, call, audit=audit) == 0x00050000 | errno.ENOSYS
    assert outcome(steps, 1, audit=0x40000003) == 0x80000000  # 32-bit calls have other numbers
    refuse, opening = 0x00050000 | errno.EACCES, confined.LOOKED_AT["openat"][column]
    assert outcome(steps, opening, (0, 0, os.O_RDONLY | os.O_CLOEXEC), audit) == 0x7FFF0000
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
        assert outcome(steps, opening, (0, 0, flags), audit) == refuse
    cloning = confined.LOOKED_AT["clone"][column]
    assert outcome(steps, cloning, (0x3D0F00,), audit) == 0x7FFF0000  # pthread_create's flags
    assert outcome(steps, cloning, (0x1200011,), audit) == refuse  # fork's
    setting = confined.LOOKED_AT["fcntl"][column]
    for command, expected in ((1, 0x7FFF0000), (8, refuse), (15, refuse)):
        assert outcome(steps, setting, (0, command), audit) == expected


@pytest.mark.parametrize(
    "header, machine",
    [("x86_64-linux-gnu/asm/unistd_64.h", "x86_64"), ("asm-generic/unistd.h", "aarch64")],
)
def test_numbers_are_the_kernels(header, machine):
    """Each number in the table is the one in the kernel's header."""
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"no {path} (the kernel's headers)")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
    for name, numbers in {**confined.REFUSED, **confined.LOOKED_AT}.items():
        number = numbers[confined.MACHINES[machine][0]]
        # The generic header has some of these for other machines than aarch64, under no number.
        assert known.get(name) == (None if number is None else str(number)), name


def test_other_machines_are_refused():
    """A machine without a table of numbers gets no filter and an error."""
    with pytest.raises(OSError, match="no filter for vax"):
        confined.filter_steps("vax")
