"""What one update uses: flags, learning rate, AdamW, FLOPs, the metrics log.

Leaves of sft.py and dpo.py: every function here is called and returns.
"""

import math
import platform
import resource
import sys

import torch

from program.errors import RunError

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


def warmup_updates(total, ratio):
    """ceil(ratio·total), rounded first: 0.1 · 30 is a little more than 3 in floating point."""
    return math.ceil(round(ratio * total, 6))


def learning_rate(step, total, peak, warmup_ratio):
    """Rate of update `step` (from 0) of `total`: linear from 0 to the peak, then linear to 0."""
    warmup = warmup_updates(total, warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    return peak * (total - step) / (total - warmup)


def make_optimizer(model, config):
    """AdamW over all parameters, its state in fp32 like them (EasyLM optimizers.py)."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )


def clip_gradients(model, clip):
    """Scale the gradients to a global norm of at most `clip` (0: leave them); the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def check_finite(step, loss, grad_norm, documents, members):
    """Raise `RunError`, naming the update's data, before a loss that is not finite does harm."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        names = ", ".join(documents.names(members))
        raise RunError(
            f"update {step}: loss {loss}, gradient norm {grad_norm}; stopped before the weights "
            f"changed. Its data: {names}"
        )


def model_flops(config, lengths, predicted):
    """FLOPs of forward and backward over documents of these lengths (tokens); unit-tested.

    Per token 6 per weight of the blocks' matrices; per predicted token 6 per weight of the head;
    per document of n tokens and layer 6·n²·H·D: QKᵀ and PV are 2·n²·H·D each, half of it masked,
    and backward is twice forward. Neither recomputation nor the embedding's look-up counts.
    """
    E, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H, Hk, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block = 2 * E * H * D + 2 * E * Hk * D + 3 * E * F
    tokens, squares = (int(sum(int(n) ** power for n in lengths)) for power in (1, 2))
    layers = config.num_hidden_layers * (6 * block * tokens + 6 * squares * H * D)
    return layers + 6 * V * E * int(predicted)


def peak_flops(device):
    """The GPU's dense bf16 peak in FLOP/s; None for a CPU or a GPU that the table lacks."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_gib(device):
    """Most memory held so far: allocated on the GPU, or resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes / 2**30


def environment(device, world):
    """Hardware and versions, for the log."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"{platform.processor() or platform.machine()} CPU",
        "ranks": world,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
