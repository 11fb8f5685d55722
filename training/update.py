"""What one update uses: flags, learning rate, AdamW, FLOPs, the metrics log.

Leaves of sft.py and dpo.py: every function here is called and returns.
"""

import argparse
import dataclasses
import inspect
import math
import os
import platform
import re
import resource
import sys
import types
import typing

import torch

from program.errors import InputError, RunError

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

# Flag, whether the bounds themselves are allowed, and the bounds.
BOUNDS = {
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "max_seq_len": (2, math.inf),
    "lr": (0, math.inf),
    "warmup_ratio": (0, 1),
    "weight_decay": (0, math.inf),
    "beta1": (0, 1),
    "beta2": (0, 1),
    "clip": (0, math.inf),
    "beta": (0, math.inf),
    "micro_tokens": (2, math.inf),
    "max_steps": (0, math.inf),
    "save_every": (0, math.inf),
    "keep": (1, math.inf),
    "seed": (0, 2**63),
    "show": (0, math.inf),
    "slots": (1, math.inf),
    "context": (0, math.inf),
    "mmlu_shots": (0, 5),
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "max_new_tokens": (1, math.inf),
}
# How a run is carried out; it may be continued with other values. (The model is compared by its
# real path, the data by their content.)
HOW_NOT_WHAT = {
    "model",
    "data",
    "out",
    "micro_tokens",
    "max_steps",
    "save_every",
    "keep",
    "recompute",
    "compile",
}
EXCLUDED = {"lr": 0, "beta": 0, "beta1": 1, "beta2": 1, "top_p": 0}


def parse_args(config_class, argv=None):
    """The flags given on the command line, as a dict; raises `InputError` for a bad one.

    Every field of the dataclass is a flag, and the comment behind it is its help.
    """
    comments = dict(re.findall(r"^ +(\w+):.*?# (.+)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(
        description=inspect.getmodule(config_class).__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def refuse(message):
        raise InputError(f"{message} (--help lists the flags)")

    parser.error = refuse
    for field in dataclasses.fields(config_class):
        kind = field.type
        if isinstance(kind, types.UnionType):  # `int | None`: None where the default depends
            kind = typing.get_args(kind)[0]
        options = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is list:
            options = {
                "nargs": "+",
                "action": "extend",  # `--data a b` and `--data a --data b` are the same
                "metavar": {"tasks": "TASK", "stop": "TEXT"}.get(field.name, "PATH"),
            }
        default = "" if field.default is None else f" (default: {field.default})"
        help = f"{comments[field.name]}{default}".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), help=help, **options)
    return vars(parser.parse_args(argv))


def check_flags(config):
    """Raise `InputError` for a flag of sft.py or dpo.py whose value makes no sense."""
    check_bounds(config)
    if config.dtype not in ("bfloat16", "float32"):
        raise InputError(f"--dtype is {config.dtype}, expected bfloat16 or float32")
    if (config.model is None) != (config.data is None):
        raise InputError("--model and --data go together (with neither, the demo runs)")


def check_bounds(config):
    """Raise `InputError` for a flag of any script that is out of its `BOUNDS`."""
    for name, value in dataclasses.asdict(config).items():
        if name not in BOUNDS:
            continue
        low, high = BOUNDS[name]
        if not low <= value <= high or value == math.inf or value == EXCLUDED.get(name):
            kind = "an integer" if isinstance(value, int) else "a number"
            expected = f"{kind} from {low} " + ("up" if high == math.inf else f"to {high}")
            if name in EXCLUDED:
                expected += f", {EXCLUDED[name]} excluded"
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


def resolve(config, device):
    """The config with the defaults that depend on the device filled in."""
    gpu = device.type == "cuda"
    defaults = {"dtype": "bfloat16" if gpu else "float32", "recompute": gpu, "compile": gpu}
    missing = {name: v for name, v in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def run_facts(config):
    """The flags that decide what a run computes, for telling runs apart."""
    facts = dataclasses.asdict(config)
    facts = {name: value for name, value in facts.items() if name not in HOW_NOT_WHAT}
    return {"program": type(config).__name__, "model": os.path.realpath(config.model), **facts}


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
