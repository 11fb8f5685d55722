"""One training step at Llama 2 7B's width: `python bench.py step [--no-recompute] [--toy]`.

All of 7B's dimensions, and as many of its 32 layers as the GPU holds with fp32 master weights,
AdamW, recomputation (or without it, and fewer layers) and `torch.compile` per block, as sft.py runs
them: rows of 16,384 tokens of chat-like documents (mean 490), all of them trained. The MFU is
`model_flops` of training/update.py, which counts nothing twice, over the step's time and the
datasheet's dense peak. One more step runs under the profiler and shows where the time goes.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass

import torch

import sft
from benchmarks import inputs
from benchmarks.measure import Budget, doc_start_of, gpu_unless_toy, packed_lengths, write
from checkpoint.config import config_from_dict
from model import Llama
from program.flags import parse_args
from program.hardware import peak_flops, peak_memory_gib
from program.ranks import start
from training import update
from training.flags import RunFlags
from training.parallel import shard

LLAMA_2_7B = config_from_dict(inputs.FIXED | inputs.LLAMA_2_7B | {"vocab_size": 32000})
TOY = config_from_dict(inputs.FIXED | inputs.TOY | {"vocab_size": 101})

# Parts of the kernels' names in the profiler, by what the kernels do; the first match counts.
KINDS = {
    "attention": ("forward_kernel", "backward_q_kernel", "backward_kv_kernel"),
    "loss": ("softmax_kernel",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "norms, rotation, SwiGLU, sums": ("triton_",),  # as torch.compile names what it fuses
}


def layers_that_fit(memory, config, tokens, recompute=True):
    """The number of blocks that `memory` bytes of a GPU hold, at most the model's.

    Per weight 18 bytes: fp32 master, gradient and AdamW's two moments, and the bf16 copy. A block's
    activations are about 16 E and 8 F bf16 numbers per token; a block keeps its input where they
    are recomputed, else all of them. Set aside: the same 18 bytes for embedding and head, one
    block's activations, 3 GiB for the loss, the compiler and fragmentation, and a tenth of the GPU.
    """
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    activations = 2 * tokens * (16 * E + 8 * F)
    block = 18 * (E * D * heads + 3 * E * F) + (2 * tokens * E if recompute else activations)
    aside = 18 * 2 * config.vocab_size * E + activations + (3 << 30)
    return max(1, min(config.num_hidden_layers, int((0.9 * memory - aside) // block)))


def make_step(config, lengths, device, dtype, recompute):
    """The model and a function that takes one training step and returns the loss."""
    with torch.device("meta"):
        model = Llama(config)
    gpu = device.type == "cuda"
    name = str(dtype).removeprefix("torch.")
    shard(model, RunFlags(dtype=name, recompute=gpu and recompute, compile=gpu), device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    optimizer = update.make_optimizer(model, sft.SFTConfig(lr=1e-5))
    T = sum(lengths)
    ids = torch.randint(config.vocab_size, (T,), device=device)
    doc_start, predict = doc_start_of(lengths, device), torch.arange(T, device=device)

    def step():
        nll = model(ids, doc_start, predict, labels=ids.roll(-1), uniform_gradient=True)
        loss = nll.sum() / T
        loss.backward()
        update.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def where_time_goes(step):
    """Milliseconds of GPU kernels of one step, by kind."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return by_kind(
        (event.key, event.self_device_time_total / 1e3)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )


def by_kind(kernels):
    """Sums by `KINDS` of the milliseconds of kernels (name, milliseconds); the rest is "other"."""
    sums = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, ms in kernels:
        lowered = name.lower()
        kinds = (kind for kind, parts in KINDS.items() if any(part in lowered for part in parts))
        sums[next(kinds, "other")] += ms
    return sums


def measure(config, lengths, device, dtype, recompute, budget):
    """Ten steps after a warm-up of three, fewer where the time is over: figures for the file."""
    model, step = make_step(config, lengths, device, dtype, recompute)
    losses, seconds = [], []
    while len(losses) < 13 and not (len(losses) > 3 and budget.spent()):
        begin = time.perf_counter()
        losses.append(step().item())  # waits for the GPU
        seconds.append(time.perf_counter() - begin)
    T, median = sum(lengths), statistics.median(seconds[3:])
    flops, peak = update.model_flops(config, lengths, T), peak_flops(device)
    return {
        "layers": config.num_hidden_layers,
        "recompute": recompute,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": T,
        "documents": len(lengths),
        "seconds": median,
        "seconds_of_each": seconds,
        "tokens_per_second": T / median,
        "tflops": flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "mfu_formula": "training.update.model_flops / seconds / program.hardware.peak_flops",
        "peak_memory_gib": peak_memory_gib(device),
        "losses": losses,
        "kernel_ms": where_time_goes(step) if device.type == "cuda" else None,
    }


@dataclass(frozen=True)
class StepConfig:
    """Flags of `python bench.py step`."""

    toy: bool = False  # a tiny model, to rehearse on CPU
    recompute: bool = True  # activations again in backward, per block
    layers: int | None = None  # of 7B's 32 (default: as many as fit)
    minutes: float = 4.0  # no step begins after them, once four were taken
    out: str = "results/step.json"  # the figures


def main(arguments):
    """Measure, print, and write the JSON file."""
    options = StepConfig(**parse_args(StepConfig, arguments))
    budget = Budget(options.minutes)
    start()
    device = gpu_unless_toy(options)
    config, T = (TOY, 256) if options.toy else (LLAMA_2_7B, 16384)
    if not options.toy:
        memory = torch.cuda.get_device_properties(device).total_memory
        layers = options.layers or layers_that_fit(memory, config, T, options.recompute)
        config = dataclasses.replace(config, num_hidden_layers=layers)
    lengths = packed_lengths(20 if options.toy else 490, T)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = measure(config, lengths, device, dtype, options.recompute, budget)
    for name, value in result.items():
        print(f"{name}: {value}")
    facts = {"dtype": str(dtype), "config": dataclasses.asdict(config)}
    write("step", options, arguments, device, **facts, **result)
    torch.distributed.destroy_process_group()
