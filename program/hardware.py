"""The machine that a run is on: its peak speed, its memory, its versions."""

import platform
import resource
import sys

import torch

# Dense bf16 peak of a GPU, FLOP/s, from the vendor's datasheets (without sparsity).
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The GPU's dense bf16 peak in FLOP/s; None for a CPU or a GPU that the table lacks."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on the GPU, or resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes / 2**30


def on_device(
    values: torch.Tensor | list, device: torch.device, dtype: torch.dtype = torch.long
) -> torch.Tensor:
    """A tensor on `device`, of a list or of a tensor on the host, which does not wait for a GPU.

    It would, were the values in ordinary memory: they are copied to pinned memory first.
    """
    values = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def environment(device: torch.device, world: int) -> dict:
    """Hardware and versions, for the log."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"{platform.processor() or platform.machine()} CPU",
        "ranks": world,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
