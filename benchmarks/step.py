"""One training step at Llama 2 7B's width: `python bench.py step [--recompute N] [--toy]`.

All of 7B's dimensions, and as many of its 32 layers as the GPU holds with fp32 master weights and
AdamW, as sft.py runs them: rows of 16,384 tokens of chat-like documents (mean 490), all of them
trained; `torch.compile` per block; as few blocks recomputed as planning/ says. The MFU is
`model_flops` of training/update.py, which counts nothing twice, over the step's time and the
datasheet's dense peak. One more step runs under the profiler and shows where the time goes; with
--profile, kernel by kernel. `--peer transformers` then takes the same step with transformers
(benchmarks/peer.py), and compares the losses.
"""

import dataclasses
import gc
import statistics
import time
from dataclasses import dataclass

import torch

import sft
from benchmarks import inputs, peer, trace
from benchmarks.measure import Budget, doc_start_of, gpu_unless_toy, packed_lengths, write
from checkpoint.config import config_from_dict
from checkpoint.weights import local_rows
from model import Llama
from planning.fit import fits
from planning.memory import GIB, Layout, check_layout, weights
from program.errors import InputError
from program.flags import check_bounds, parse_args
from program.hardware import peak_flops, peak_memory_gib
from program.ranks import start
from training import update
from training.flags import RunFlags
from training.layout import choose
from training.parallel import shard

LLAMA_2_7B = config_from_dict(inputs.FIXED | inputs.LLAMA_2_7B | {"vocab_size": 32000})
TOY = config_from_dict(inputs.FIXED | inputs.TOY | {"vocab_size": 101})
ROW = 16384  # tokens

# Parts of the kernels' names in the profiler, by what the kernels do; the first match counts.
KINDS = {
    "attention": ("forward_kernel", "backward_q_kernel", "backward_kv_kernel"),
    "loss": ("softmax_kernel",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "norms, rotation, SwiGLU, sums": ("triton_",),  # as torch.compile names what it fuses
}


def layers_that_fit(config, available, recompute=None):
    """The most blocks, up to the model's, with which a step fits into `available` GiB.

    recompute: how many of them recompute, all by default.
    """
    for layers in range(config.num_hidden_layers, 0, -1):
        shallow = dataclasses.replace(config, num_hidden_layers=layers)
        count = layers if recompute is None else min(recompute, layers)
        if fits(shallow, layout_of(len_row=ROW, recompute=count, reshard=True), available):
            return layers
    raise InputError(f"{available:.1f} GiB of the GPU are free: not one block of the model fits")


def layout_of(len_row, **how):
    """The `Layout` of one row an update on one GPU, every token of which is trained."""
    return Layout(row_tokens=len_row, predicted=len_row, rows=1, **how)


def make_row(config, lengths, device):
    """ids, labels (T,) int64 of a row of random tokens: the label is the next token of the row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (sum(lengths),), generator=generator).to(device)
    return ids, ids.roll(-1)


@torch.no_grad()
def fill(model):
    """Random weights, from a seed and the parameters' order; norms are 1."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        rows, _ = local_rows(parameter.detach())
        rows.normal_(0, 0.02) if parameter.ndim > 1 else rows.fill_(1)


def make_step(config, lengths, device, flags, reshard):
    """A function that takes one training step, under these `RunFlags`, and returns the loss."""
    with torch.device("meta"):
        model = Llama(config)
    shard(model, flags, device, reshard)
    fill(model)
    optimizer = update.make_optimizer(model, sft.SFTConfig(lr=1e-5))
    ids, labels = make_row(config, lengths, device)
    doc_start, predict = doc_start_of(lengths, device), torch.arange(len(ids), device=device)

    def step():
        nll = model(ids, doc_start, predict, labels=labels, uniform_gradient=True)
        loss = nll.sum() / len(ids)
        loss.backward()
        update.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def by_kind(kernels):
    """Sums by `KINDS` of the milliseconds of kernels (name, milliseconds); the rest is "other"."""
    sums = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, ms in kernels:
        lowered = name.lower()
        kinds = (kind for kind, parts in KINDS.items() if any(part in lowered for part in parts))
        sums[next(kinds, "other")] += ms
    return sums


def measure(step, config, lengths, device, budget):
    """Ten steps after a warm-up of three, fewer where the time is over: figures for the file."""
    losses, seconds = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while len(losses) < 13 and not (len(losses) > 3 and budget.spent()):
        begin = time.perf_counter()
        losses.append(step().item())  # waits for the GPU
        seconds.append(time.perf_counter() - begin)
    T, median = sum(lengths), statistics.median(seconds[3:])
    flops, peak = update.model_flops(config, lengths, T), peak_flops(device)
    return {
        "seconds": median,
        "seconds_of_each": seconds,
        "tokens_per_second": T / median,
        "tflops": flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "mfu_formula": "training.update.model_flops / seconds / program.hardware.peak_flops",
        "peak_memory_gib": peak_memory_gib(device),
        "losses": losses,
    }


def measure_peer(config, lengths, device, flags, budget):
    """The figures of the same step by transformers."""
    dtype = getattr(torch, flags.dtype)
    row = make_row(config, lengths, device)
    how = (device, dtype, flags.recompute > 0, flags.compile, fill)
    step, facts = peer.make_step(config, *row, lengths, *how)
    return facts | measure(step, config, lengths, device, budget)


@dataclass(frozen=True)
class StepConfig:
    """Flags of `python bench.py step`."""

    toy: bool = False  # a tiny model, to rehearse on CPU
    recompute: int | None = None  # last blocks that run again in backward (default: as planned)
    layers: int | None = None  # of 7B's 32 (default: as many as fit)
    profile: bool = False  # print the 30 kernels that cost most
    peer: str | None = None  # transformers: its step, too
    minutes: float = 4.0  # no step begins after them, once four were taken
    out: str = "results/step.json"  # the figures


def main(arguments):
    """Measure, print, and write the JSON file."""
    options = StepConfig(**parse_args(StepConfig, arguments))
    if options.peer not in (None, "transformers"):
        raise InputError(f"--peer is {options.peer}, expected transformers")
    check_bounds(options)
    budget = Budget(options.minutes)
    start()
    device = gpu_unless_toy(options)
    config, flags, reshard = planned(options, device)
    lengths = packed_lengths(20 if options.toy else 490, 256 if options.toy else ROW)
    facts = {
        "dtype": flags.dtype,
        "config": dataclasses.asdict(config),
        "layers": config.num_hidden_layers,
        "recompute": flags.recompute,
        "reshard": bool(reshard),
        "parameters": weights(config),
        "tokens": sum(lengths),
        "documents": len(lengths),
    }
    step = make_step(config, lengths, device, flags, reshard)
    result = facts | measure(step, config, lengths, device, budget)
    table = trace.kernels(step, device)
    if device.type == "cuda":
        result["kernel_ms"] = by_kind((row["name"], row["ms"]) for row in table)
    for name, value in result.items():
        print(f"{name}: {value}")
    if options.profile:
        result["kernels"] = table[:30]
        trace.show(result["kernels"])
    if options.peer:
        del step  # with it goes our model
        gc.collect()
        torch.cuda.empty_cache()
        result["peer"] = budget.measure(
            lambda: measure_peer(config, lengths, device, flags, budget)
        )
        compare(result)
    write("step", options, arguments, device, **result)
    torch.distributed.destroy_process_group()


def planned(options, device):
    """The model's config, the `RunFlags` and what `shard` takes as `reshard`."""
    flags = RunFlags(dtype="float32", recompute=options.recompute or 0, compile=False)
    if options.toy:
        check_layout(TOY, layout_of(256, recompute=flags.recompute))
    if device.type == "cpu":
        return TOY, flags, None
    flags = dataclasses.replace(flags, dtype="bfloat16", compile=True)
    if options.toy:
        return TOY, flags, None
    available = torch.cuda.mem_get_info(device)[0] / GIB
    layers = options.layers or layers_that_fit(LLAMA_2_7B, available, options.recompute)
    config = dataclasses.replace(LLAMA_2_7B, num_hidden_layers=layers)
    layout, line, _ = choose(config, layout_of(ROW), available, options.recompute, ROW)
    print(line)
    flags = dataclasses.replace(flags, recompute=layout.recompute)
    return config, flags, not layout.keeps_gathered


def compare(result):
    """Print the peer's figures beside ours, and raise where its first loss is another one."""
    theirs = result["peer"]
    if "skipped" in theirs:
        print(f"transformers: {theirs['skipped']}")
        return
    ours, first = result["losses"][0], theirs["losses"][0]
    ratio = theirs["seconds"] / result["seconds"]
    print(
        f"transformers ({theirs['attention']}, padding {theirs['padding']:.0%}): "
        f"{theirs['tokens_per_second']:,.0f} tokens/s, {theirs['peak_memory_gib']:.1f} GiB; ours "
        f"is {ratio:.2f} times as fast. First loss {first:.4f}, ours {ours:.4f}"
    )
    # In fp32 only the order of sums differs. In bf16 a token's loss has an error of some 2^-8,
    # of which the mean over the row keeps little; both compute it in other roundings.
    tolerance = 1e-5 if result["dtype"] == "float32" else 1e-3
    assert abs(first - ours) < tolerance * ours, f"first losses differ: {ours}, {first}"
