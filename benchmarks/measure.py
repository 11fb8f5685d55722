"""What every benchmark shares: times, FLOPs as pure functions, the record of where it ran."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton.testing


def milliseconds(function, device):
    """Median time of one call; on a GPU by events, with the L2 cache emptied before each call."""
    if device.type == "cuda":
        return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")
    function()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[1]


def attention_flops(lengths, H, D):
    """FLOPs of forward and of backward: causal, so half of 4 n² H D and 2.5 times that."""
    forward = 2 * H * D * sum(n * n for n in lengths)
    return {"forward": forward, "backward": 5 * forward // 2, "both": 7 * forward // 2}


def cross_entropy_flops(N, V, E):
    """FLOPs of the three matrix products: logits, gradient of hidden, gradient of weight."""
    return 3 * 2 * N * V * E


def packed_lengths(mean, total, longest=8192, seed=0):
    """Lengths of documents that fill a row of `total` tokens, spread like chats about their mean.

    Log-normal with sigma 0.9, whose mean is exp(mu + sigma²/2); the last document is cut.
    """
    generator, sigma = torch.Generator().manual_seed(seed), 0.9
    lengths = []
    while sum(lengths) < total:
        z = torch.randn((), generator=generator)
        length = (sigma * z - sigma**2 / 2).exp() * mean
        lengths.append(min(max(8, int(length)), longest, total - sum(lengths)))
    return lengths


def doc_start_of(lengths, device):
    """doc_start (T,) int32 of documents of these lengths, laid end to end."""
    lengths = torch.tensor(lengths)
    return torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).int().to(device)


def write(path, command, device, **content):
    """A JSON file of results with the hardware, versions, commit, command and date they are of."""
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # Of paths only the last name: where this machine keeps its files is of no use elsewhere.
        "command": re.sub(r"(?<=[ =])/(\S*/)?", "", command),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **content,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def commit():
    """The commit that runs, with a + where files were changed since; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def cpu_name():
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{found[1].strip() if found else 'CPU'} ({platform.machine()})"


def versions():
    """Python, CUDA, and the packages that are installed."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers", "trl", "safetensors", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
