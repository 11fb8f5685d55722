"""The kernels of a step, from the profiler's trace: name, calls, milliseconds, bytes.

On a GPU these are its kernels; on a CPU the operators of PyTorch, by their own time.
"""

import json
import math
import tempfile
from pathlib import Path

import torch

BYTES = {
    "double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8,
    "int": 4, "short": 2, "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace


def kernels(step, device):
    """Rows `{"name", "calls", "ms", "gb"}` of all kernels of one `step()`, the costliest first.

    gb: of what torch.compile has fused, the GB that the kernel must move in all its calls.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return rows(events, device.type == "cuda")


def rows(events, gpu):
    """The rows of `kernels`, from the events of a trace."""
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    if gpu:
        # What PyTorch was doing as it launched the kernel has the same id, and what was given it.
        given = {operator["args"]["External id"]: operator for operator in operators}
        timed = [
            (event, event["dur"], given.get(event["args"].get("External id")))
            for event in events
            if event.get("cat") in ON_GPU
        ]
    else:
        timed = [(event, own, event) for event, own in own_times(operators)]
    table = {}
    for event, microseconds, operator in timed:
        name = event["name"]
        row = table.setdefault(name, {"name": name, "calls": 0, "ms": 0.0, "gb": None})
        row["calls"] += 1
        row["ms"] += microseconds / 1e3
        if name.startswith("triton_") and operator:
            row["gb"] = (row["gb"] or 0.0) + bytes_given(operator["args"]) / 1e9
    return sorted(table.values(), key=lambda row: -row["ms"])


def bytes_given(arguments):
    """Bytes of the tensors that a kernel was given, each once.

    So much it must read or write at least: inputs and outputs are both among them. (Of a table
    that it looks up, it may read less; what it changes in place, it reads and writes.)
    """
    shapes, types = arguments.get("Input Dims", []), arguments.get("Input type", [])
    return sum(
        math.prod(shape) * BYTES[kind]
        for shape, kind in zip(shapes, types, strict=True)
        if kind in BYTES and shape  # numbers have no shape
    )


def own_times(operators):
    """`(operator, microseconds)` without those of the operators that it called."""
    found, stacks = [], {}
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        stack = stacks.setdefault(event["tid"], [])
        while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            stack[-1][1] -= event["dur"]
        stack.append([event, event["dur"]])
        found.append(stack[-1])
    return found


def show(table, count=30):
    """Print the `count` costliest kernels; GB/s stands beside what the bytes are known of."""
    print(f"{'ms':>9} {'calls':>6} {'GB':>8} {'GB/s':>7}  kernel")
    for row in table[:count]:
        moved = f"{'':>8} {'':>7}"
        if row["gb"] is not None:
            moved = f"{row['gb']:8.2f} {row['gb'] / row['ms'] * 1e3:7,.0f}"
        print(f"{row['ms']:9.3f} {row['calls']:6} {moved}  {row['name'][:90]}")
