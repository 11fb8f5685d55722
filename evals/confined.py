"""The process that evals/sandbox.py starts: it confines itself, then runs one untrusted program.

Between this process and the program stand, in this order,

    limits        of CPU time, memory, open files; no file may grow; no core dumps
    namespaces    where the kernel allows them: no other processes, no network, no powers of root
    a filter      of system calls, always: no new process and no new program, nothing sent to
                  another process, no socket, no file opened for writing, made, changed or removed

The filter (seccomp, Linux 3.17) needs no privilege. It works in containers, too, where namespaces
are often forbidden, and a process cannot take it off. What is left to the program is computation:
it can read files, start threads, and write to the one pipe on which its verdict goes to sandbox.py.

Standard input is a JSON object: program, token, cpu_seconds, memory_bytes. Standard output gets one
byte ("n": namespaces and filter; "f": the filter alone; "!": neither, with the reason after it).
When the program has ended, it gets the token if the program ran to its end, else what it raised.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys

# linux/sched.h: user, process, network and System V IPC namespaces
NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000
CLONE_THREAD = 0x00010000
# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
# linux/filter.h: load a word; jump if equal, if at least, if any bit is set; return
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # linux/seccomp.h; REFUSE | errno
FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
F_SETOWN, F_SETOWN_EX = 8, 15  # these make the kernel send signals to another process

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, linux/audit.h
# From this number on both machines have the same numbers. All calls since 2019 (io_uring, clone3,
# pidfd_*, new ways to mount and to open) are answered as unknown; C libraries then use older calls.
NEWER = 424
# Refused system calls: numbers on x86_64 and aarch64 (None: aarch64 has only a newer call for it).
REFUSED = {
    # Processes: none is started, and no other one is stopped, inspected or slowed down.
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "setsid": (112, 157),
    "setpgid": (109, 154), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "setrlimit": (160, 164), "prlimit64": (302, 261),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # Network, and memory shared with others.
    "socket": (41, 198), "socketpair": (53, 199), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "mq_unlink": (241, 181), "mq_notify": (244, 184),
    "memfd_create": (319, 279),
    # Files: none is made, changed or removed. `open` and `openat` depend on their flags.
    "creat": (85, None), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "chown": (92, None), "lchown": (94, None), "fchown": (93, 55),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "open_by_handle_at": (304, 265), "flock": (73, 32), "ioctl": (16, 29),
    # The machine: for a program that runs as root where there are no namespaces.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "iopl": (172, None), "ioperm": (173, None),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "acct": (163, 89),
    "quotactl": (179, 60), "syslog": (103, 116), "vhangup": (153, 58), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
LOOKED_AT = {"open": (2, None), "openat": (257, 56), "clone": (56, 220), "fcntl": (72, 25)}


def main() -> None:
    request = json.load(sys.stdin)
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        limit(request["cpu_seconds"], request["memory_bytes"])
        apart = enter_namespaces(libc, channel)
        install_filter(libc)
    except OSError as error:
        os.write(channel, f"!{error}".encode())
        return
    del sys.path[0]  # this folder: the program gets Python's modules and the installed packages
    os.write(channel, b"n" if apart else b"f")
    try:
        # Without __name__, as in the original: no `if __name__ == "__main__"` block runs.
        exec(compile(request["program"], "program", "exec"), {})
        answer = request["token"]
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too, are failures
        answer = f"{type(error).__name__}: {error}"
    os.write(channel, answer.encode(errors="replace")[:400])
    os._exit(0)  # without the program's exit handlers


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Limit what this process may use, for good."""
    for resource_kind, maximum in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(resource_kind, (maximum, maximum))


def enter_namespaces(libc: ctypes.CDLL, channel: int) -> bool:
    """Enter new namespaces; False if the kernel forbids it.

    A child process, the first of its process namespace, then continues in the caller's place.
    """
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end when sandbox.py ends
    if libc.unshare(NAMESPACES):
        return False
    pid = os.fork()
    if pid:  # only a child process is inside the new process namespace
        os.close(channel)  # the pipe then closes when the program ends
        os.waitpid(pid, 0)
        os._exit(0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def install_filter(libc: ctypes.CDLL) -> None:
    """Let this process only compute from here on. Raises `OSError` if the kernel has no filter."""
    steps = filter_steps(platform.machine())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel has no filter of system calls (seccomp)")


def filter_steps(machine: str) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, constant) of a classic BPF program.

    The program reads struct seccomp_data: the call's number at byte 0, the machine at 4, the call's
    arguments from 16 on, 8 bytes each. A jump is the number of instructions to skip.
    """
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no filter for {machine}, only for {', '.join(MACHINES)}")
    column, audit = MACHINES[machine]
    allow, refuse = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE | errno.EACCES)

    def argument(n):
        return (LOAD, 0, 0, 16 + 8 * n)  # its lower half, which has all the flags that matter

    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, NEWER), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            steps += [(EQUAL, 0, 1, numbers[column]), refuse]
    look = {
        "open": [argument(1), (ANY_BIT, 0, 1, FOR_WRITING), refuse, allow],
        "openat": [argument(2), (ANY_BIT, 0, 1, FOR_WRITING), refuse, allow],
        "clone": [argument(0), (ANY_BIT, 1, 0, CLONE_THREAD), refuse, allow],
        "fcntl": [argument(1), (EQUAL, 1, 0, F_SETOWN), (EQUAL, 0, 1, F_SETOWN_EX), refuse, allow],
    }
    for name, more in look.items():
        number = LOOKED_AT[name][column]
        if number is not None:
            steps += [(EQUAL, 0, len(more), number), *more]
    return [*steps, allow]


if __name__ == "__main__":
    main()
