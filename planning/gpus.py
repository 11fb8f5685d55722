"""GPUs: memory, and how fast they compute and exchange. One table, with sources.

Peaks and bandwidths are the vendor's datasheets' (dense bf16, no sparsity; SXM unless said). What a
training step reaches of them is planning/speed.py's. What NCCL reaches is its own `busbw`:

    in a machine    A100, NVLink 300 GB/s a direction: 232 measured (NVIDIA/nccl#1048). The same
                    share, 0.77, is taken for every NVLink, and 20 of PCIe 4.0's 32 GB/s (assumed;
                    GeForce cards copy through the host).
    between         H100: eight NICs of 400 Gb/s, 46 to 48 GB/s each (NVIDIA/nccl-tests#290); at 32
                    machines a user saw 200 GB/s in all (nccl#1218), so large clusters may be half
                    as fast. A100: 8 x 200 Gb/s at the 90 % of nccl#1048. Others: 100 Gb/s at 90 %.

`gib` is what torch.cuda reports in all, less 0.6 GiB for the CUDA context.
"""

from dataclasses import dataclass

from program.errors import InputError

CONTEXT = 0.6  # GiB of the CUDA context and its kernels, outside PyTorch's allocator


@dataclass(frozen=True)
class GPU:
    """One kind of GPU. FLOP/s, bytes/s and GiB; network: bytes/s of a whole machine of eight."""

    name: str
    flops: float  # dense bf16 peak
    bandwidth: float  # of its memory
    reported: float  # GiB of memory as torch.cuda reports it
    link: float  # NCCL's bus bandwidth between GPUs of a machine
    network: float  # and of a machine with the others
    fp32: float = 60e12  # peak without tensor cores, for --dtype float32

    @property
    def gib(self) -> float:
        """GiB that PyTorch can use."""
        return self.reported - CONTEXT


GPUS = {
    "h100": GPU("H100 80 GB SXM", 989e12, 3.35e12, 79.1, 347e9, 376e9, 67e12),
    "h100-pcie": GPU("H100 80 GB PCIe", 756e12, 2.0e12, 79.1, 20e9, 11e9, 51e12),
    "h200": GPU("H200 141 GB SXM", 989e12, 4.8e12, 139.8, 347e9, 376e9, 67e12),
    "b200": GPU("B200 180 GB", 2250e12, 8.0e12, 178.3, 693e9, 376e9, 75e12),
    "a100": GPU("A100 80 GB SXM", 312e12, 2.04e12, 79.2, 232e9, 180e9, 19.5e12),
    "a100-40": GPU("A100 40 GB SXM", 312e12, 1.56e12, 39.4, 232e9, 180e9, 19.5e12),
    "l40s": GPU("L40S 48 GB", 362e12, 0.864e12, 44.4, 20e9, 11e9, 91e12),
    "4090": GPU("RTX 4090 24 GB", 165e12, 1.01e12, 23.6, 20e9, 11e9, 82e12),
    "3090": GPU("RTX 3090 24 GB", 71e12, 0.936e12, 23.6, 20e9, 11e9, 35e12),
}
MACHINE = 8  # GPUs in one


def find_gpu(name: str) -> GPU:
    """The `GPU` of that name; raises `InputError` for one that the table lacks."""
    if name.lower() not in GPUS:
        raise InputError(f"--gpu is {name}, expected one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def ring_bandwidth(gpu: GPU, ranks: int) -> float:
    """NCCL's bus bandwidth, bytes/s, of a ring through so many neighbouring ranks."""
    return gpu.link if ranks <= MACHINE else min(gpu.link, gpu.network)
