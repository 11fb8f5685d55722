"""What one update is made of, besides its loss: learning rate, AdamW, clipping, and its figures.

Called by the loops, sft.py and dpo.py, in this order.
"""

import math
from collections.abc import Collection

import numpy as np
import torch

from model import LlamaConfig
from program.errors import RunError
from program.hardware import peak_flops, peak_memory_gib
from tokens.documents import Documents


def warmup_updates(total: int, ratio: float) -> int:
    """Updates of `total` in which the rate rises: ceil(ratio·total), but never all of them.

    Rounded before, since 0.1 · 30 is a little over 3 in floating point. A run of one update has no
    warm-up: its only rate would be 0.
    """
    return min(math.ceil(round(ratio * total, 6)), total - 1)


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Rate of update `step` (from 0): linear from 0 to the peak, then to 0 after the last."""
    warmup = warmup_updates(total, warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    return peak * (total - step) / (total - warmup)


def make_optimizer(model: torch.nn.Module, config) -> torch.optim.AdamW:
    """AdamW over all trained weights; they and its moments are fp32 (EasyLM optimizers.py)."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )


def clip_gradients(model: torch.nn.Module, clip: float) -> float:
    """Scale the gradients to a global norm of at most `clip` (0: none). Returns the norm before.

    As `torch.nn.utils.clip_grad_norm_`, bit for bit. But that multiplies by 1 where the norm is
    below the limit: at 7B another 54 GB are read and written, beside the 189 of AdamW.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    total_norm = torch.nn.utils.get_total_norm(gradients)
    norm = (total_norm.full_tensor() if hasattr(total_norm, "full_tensor") else total_norm).item()
    # torch divides by norm + 1e-6 in fp32. Near the limit its rounding decides, not ours.
    if norm + 1e-6 > 0.999 * (clip or math.inf):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, total_norm)
    return norm


def check_finite(step: int, loss: float, grad_norm: float, documents: Documents,
                 members: Collection[int]) -> None:  # fmt: skip
    """Raise `RunError`, with the names of the update's data, unless loss and norm are finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        names = ", ".join(documents.names(members))
        raise RunError(
            f"update {step}: loss {loss}, gradient norm {grad_norm}; stopped before the weights "
            f"changed. Its data: {names}"
        )


def model_flops(config: LlamaConfig, lengths: Collection[float], predicted: int,
                shared: Collection[float] = (), lora_rank: int = 0) -> int:  # fmt: skip
    """FLOPs of forward and backward over documents of these lengths (tokens).

    Per token 6 per weight of the blocks' matrices; per predicted token 6 per weight of the head;
    per document of n tokens and layer 6·n²·H·D: QKᵀ and PV are 2·n²·H·D each, half of it masked,
    and backward is twice forward. Neither recomputation nor the embedding's look-up counts. With
    LoRA the adapters' weights have 6, all others, which need no gradient, 4. shared: lengths of the
    prompts that two of the documents have in common, which count once.
    """
    E, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H, Hk, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    each = 4 if lora_rank else 6
    block = each * (2 * E * H * D + 2 * E * Hk * D + 3 * E * F)
    block += 6 * lora_rank * (7 * E + 2 * H * D + 2 * Hk * D + 3 * F)
    tokens, squares = (
        sum(int(n) ** power for n in lengths) - sum(int(n) ** power for n in shared)
        for power in (1, 2)
    )
    layers = config.num_hidden_layers * (block * tokens + 6 * squares * H * D)
    return layers + each * V * E * int(predicted)


def measurements(run, members: np.ndarray, seconds: float, device: torch.device,
                 world: int) -> dict[str, float]:  # fmt: skip
    """What metrics.jsonl says of any update: tokens, speed, memory, and on a GPU its use, `mfu`.

    members: the update's records, on all ranks. MFU is `model_flops` over the GPUs' peak.
    """
    documents = run.documents
    tokens, trained = int(documents.tokens[members].sum()), documents.trained_counts[members].sum()
    record = {
        "trained_tokens": int(trained),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_gib": peak_memory_gib(device),
    }
    if peak := peak_flops(device):
        lengths, shared = documents.lengths[members].ravel(), documents.shared[members].ravel()
        flops = model_flops(run.model.config, lengths, trained, shared, run.config.lora_rank)
        record["mfu"] = flops / seconds / peak / world
    return record


def bar_text(record: dict) -> str:
    """The figures of a record of metrics.jsonl that the progress bar shows."""
    formats = {
        "loss": "loss {:.4f}",
        "rewards/margins": "margin {:.3f}",
        "rewards/accuracies": "accuracy {:.0%}",
        "lr": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
    }
    return ", ".join(text.format(record[name]) for name, text in formats.items() if name in record)
