"""What every benchmark shares: clocks, FLOPs as pure functions, the results file."""

import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from program.errors import InputError


def milliseconds(function, device):
    """Median time of one call.

    On a GPU by events, after a warm-up. Before each call the L2 cache is emptied and the GPU pauses
    while the host runs ahead, so that neither a warm cache nor the launch of small kernels counts.
    """
    if device.type == "cuda":
        return milliseconds_on_gpu(function)
    function()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[1]


def milliseconds_on_gpu(function, total=150, fewest=7, most=50):
    """Median of as many calls as fit into `total` milliseconds."""
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # five times an H100's L2
    times = []
    for call in range(2 + most):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(1_000_000)  # cycles: about half a millisecond
        start.record()
        function()
        end.record()
        end.synchronize()
        if call >= 2:
            times.append(start.elapsed_time(end))
        if len(times) >= fewest and sum(times) > total:
            break
    return statistics.median(times)


def gpu_unless_toy(flags):
    """The GPU's device; with --toy, where there is no GPU, the CPU's."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not flags.toy:
        raise InputError("found no GPU, expected one (--toy rehearses without)")
    return torch.device("cpu")


class Budget:
    """A limit on the time of a whole benchmark: measurements do not begin after it."""

    def __init__(self, minutes):
        self.limit, self.begin = 60 * minutes, time.monotonic()

    def seconds(self):
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    def spent(self):
        """Whether the time is over."""
        return self.seconds() > self.limit

    def measure(self, function):
        """What `function()` returns, or the reason why it returned nothing, as a dict.

        One failure must not end a comparison.
        """
        if self.spent():
            return {"skipped": "out of time"}
        try:
            return function()
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")[:200]
            if not isinstance(error, Unavailable):
                reason = f"{type(error).__name__}: {reason}"
            return {"skipped": reason}


class Unavailable(Exception):
    """What this machine or installation lacks; the text says so."""


def attention_flops(lengths, H, D):
    """FLOPs of forward and of backward: causal, so half of 4 n² H D and 2.5 times that.

    A pair (prompt, chosen, rejected) is two documents whose prompt counts once.
    """
    pairs = sum((p + c) ** 2 + (p + r) ** 2 - p * p for p, c, r in pairs_of(lengths))
    forward = 2 * H * D * (pairs + sum(n * n for n in lengths if isinstance(n, int)))
    return {"forward": forward, "backward": 5 * forward // 2, "both": 7 * forward // 2}


def cross_entropy_flops(N, V, E):
    """FLOPs of the three matrix products: logits, gradient of hidden, gradient of weight."""
    return 3 * 2 * N * V * E


def packed_lengths(mean, total, seed=0):
    """Lengths of documents that fill a row of `total` tokens, spread like chats about their mean.

    Log-normal with sigma 0.9: the quantiles of as many documents as have this mean, so that a
    single row is typical, scaled to the row, and in random order. The longest document takes the
    tokens that rounding leaves.
    """
    count = max(1, round(total / mean))
    chances = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    sizes = (0.9 * torch.special.ndtri(chances)).exp()
    lengths = (sizes * (total / sizes.sum())).long().clamp(min=1)
    lengths[-1] += total - lengths.sum()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return lengths[order].tolist()


def pairs_of(lengths):
    """Those of a row's lengths that are pairs: (prompt, chosen, rejected)."""
    return [pair for pair in lengths if not isinstance(pair, int)]


def row_tokens(lengths):
    """Tokens of a row of documents and pairs."""
    return sum(n if isinstance(n, int) else sum(n) for n in lengths)


def doc_start_of(lengths, device):
    """doc_start (T,) int32 of documents, or pairs, of these lengths, end to end in one row."""
    lengths = torch.tensor([n if isinstance(n, int) else sum(n) for n in lengths])
    return torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).int().to(device)


def doc_end_of(lengths, device):
    """doc_end (T,) int32 of the same row: chosen ends before rejected begins."""
    parts, ends, begin = [], [], 0
    for n in lengths:
        prompt, chosen, rejected = (n, 0, 0) if isinstance(n, int) else n
        end = begin + prompt + chosen + rejected
        parts += [prompt, chosen, rejected]
        ends += [end, begin + prompt + chosen, end]
        begin = end
    return torch.repeat_interleave(torch.tensor(ends), torch.tensor(parts)).int().to(device)


def write(name, flags, arguments, device, **content):
    """Write the results of `python bench.py NAME [arguments]` to `flags.out`, as JSON.

    Hardware, versions, commit, command and date go with them; returns all of it.
    """
    command = " ".join(["python bench.py", name, *arguments])
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # Paths lose their folders: where this machine keeps its files is of no use elsewhere.
        "command": re.sub(r"(?<=[ =])/(\S*/)?", "", command),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "toy": getattr(flags, "toy", False),
        **content,
    }
    path = Path(flags.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
    return record


def commit():
    """The commit that runs, with a + where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def cpu_name():
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{model[1].strip() if model else 'CPU'} ({platform.machine()})"


def versions():
    """Python, CUDA, and the packages that are installed."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers", "trl", "safetensors", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
