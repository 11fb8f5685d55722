"""A function over the batches of a file, on all cores, with the results in the file's order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor


def in_order(encode: Callable, batches: Iterable[tuple], size: int) -> Iterator[tuple]:
    """`(encode(first, batch), done)` of every `(first, batch, done)`, in their order, on all cores.

    No more batches are read than the workers can soon take, so memory stays bounded. Processes are
    not worth starting for a file of less than 4 MB, a second's work.
    """
    if size < 4 << 20:
        for first, batch, done in batches:
            yield encode(first, batch), done
        return
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A fork of this process would copy torch's threads and the GPU's state in the middle of work.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, follow_parent) as pool:
        waiting = deque()
        for first, batch, done in batches:
            waiting.append((pool.submit(encode, first, batch), done))
            if len(waiting) > 3 * workers:
                future, done = waiting.popleft()
                yield future.result(), done
        for future, done in waiting:
            yield future.result(), done


def follow_parent() -> None:
    """In a worker: leave Ctrl-C to the process that started it, and end when that process ends."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()
