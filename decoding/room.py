"""What fits on a GPU beside the model: how many sequences, or whether it can work at all.

Arithmetic on sizes, but for `gpu_of`, which asks the GPU. Called by generator.py before weights are
loaded, and by cached_model.py, which makes the cache.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.decode_attention import takes
from model import LlamaConfig
from program.errors import InputError

ROW_TOKENS = 8192  # most tokens of one forward pass, where there is more than one prompt
ON_CPU = 16  # sequences at a time
# More do not pay: at 256 a step of 7B multiplies about as long as it reads weights, and every
# further sequence adds the time in which its own keys and values are read.
MOST = 256
STEP = 256  # tokens: a cache's room is a multiple of it, so that the next prompts need no new one
GPU_STEP = 64  # on a GPU, where room is dear and a new one cheap
GIB = 1 << 30


@dataclass(frozen=True)
class GPU:
    """A GPU's name, compute capability, and bytes of memory that this process may still take."""

    name: str
    capability: tuple[int, int]
    free: int


def gpu_of(device: torch.device) -> GPU:
    """What `GPU` says of a CUDA device. What torch holds unused counts as free."""
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    name = torch.cuda.get_device_name(device)
    return GPU(name, torch.cuda.get_device_capability(device), free + held)


def token_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers: 512 KiB for Llama 2 7B in bf16."""
    elements = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * elements * dtype.itemsize


def working_bytes(config: LlamaConfig, dtype: torch.dtype, tokens: int, slots: int) -> int:
    """Bytes that a row of `tokens` and a step of `slots` sequences need beside weights and cache.

    Of a row, at SwiGLU: three tensors as wide as the MLP, and six as the stream (two of them fp32
    copies in a norm). Of a step, four copies of the fp32 logits while it is sampled. And 1 GiB: for
    the libraries' workspaces, the graphs, and what the allocator cannot use.
    """
    E, F = config.hidden_size, config.intermediate_size
    of_row = tokens * (3 * F + 8 * E) * dtype.itemsize
    return of_row + 4 * 4 * slots * config.vocab_size + GIB


def slots_that_fit(
    config: LlamaConfig, dtype: torch.dtype, tokens: int, sequences: int, free: int
) -> int:
    """Slots of `tokens` each for `sequences` sequences: 1 to MOST, as many as `free` bytes hold.

    A power of two, or what the memory sets as the limit; one slot more is for a shared beginning.
    """
    wanted = min(MOST, 1 << max(0, sequences - 1).bit_length())
    left = free - working_bytes(config, dtype, max(ROW_TOKENS, tokens), wanted)
    return max(1, min(wanted, left // (tokens * token_bytes(config, dtype)) - 1))


def check_gpu(
    folder: str | Path, config: LlamaConfig, dtype: torch.dtype, weights: int, gpu: GPU
) -> None:
    """Raise `InputError` where a GPU cannot decode with the model of `folder`.

    weights: how many it has. The GPU must run the kernels, and hold the weights and the shortest
    cache of one sequence.
    """
    if not takes(config.head_dim):
        raise InputError(
            f"{folder}: config.json has heads of {config.head_dim} elements, expected a multiple "
            "of 16 up to 128 on a GPU (CUDA_VISIBLE_DEVICES= runs it on the CPU)"
        )
    if gpu.capability < (8, 0):
        major, minor = gpu.capability
        raise InputError(
            f"{gpu.name} has compute capability {major}.{minor}, expected 8.0 (A100, RTX 30) or "
            "later (CUDA_VISIBLE_DEVICES= runs on the CPU)"
        )
    size = weights * dtype.itemsize
    needed = size + working_bytes(config, dtype, STEP, 1) + 2 * STEP * token_bytes(config, dtype)
    if needed > gpu.free:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{folder}: its weights take {size / GIB:.1f} GiB in {kind}, and decoding at least "
            f"{needed / GIB:.1f} GiB; {gpu.name} has {gpu.free / GIB:.1f} GiB free"
        )
