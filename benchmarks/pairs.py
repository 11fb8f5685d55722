"""A training step on preference pairs, each prompt once beside twice: `python bench.py pairs`.

Blocks of Llama 2 7B's width, all recomputed, and DPO's loss, backward, clipping and AdamW on one
row of 16,384 tokens: as many pairs as it holds with two prompts each, then the same pairs as
training/reference.py packs them, each prompt once. Two kinds of pairs, by tokens of the prompt and
of each answer: a long prompt, and about what UltraFeedback has. The reference's log-probabilities
are zeros: they cost nothing in an update.
"""

import gc
import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

import sft
from benchmarks import step
from benchmarks.measure import Budget, gpu_unless_toy, write
from data import pack_row
from model import Llama
from program.flags import parse_args
from program.hardware import peak_memory_gib
from program.ranks import start
from training import update
from training.flags import RunFlags
from training.parallel import shard

CASES = ((1000, 200), (185, 305))  # tokens of the prompt, of each answer
BETA = 0.1


def make_pairs(config, prompt, answer, tokens):
    """`(ids, trained)` of chosen, rejected, chosen, …, so many pairs as `tokens` hold."""
    random = np.random.default_rng(prompt)
    sequences = []
    for _ in range(max(1, tokens // (2 * (prompt + answer)))):
        shared = random.integers(config.vocab_size, size=prompt)
        for _ in range(2):
            ids = np.concatenate([shared, random.integers(config.vocab_size, size=answer)])
            sequences.append((ids.astype(np.int32), np.arange(prompt + answer) >= prompt))
    return sequences


def make_model(config, flags, device):
    """The model with random weights, and its optimizer."""
    with torch.device("meta"):
        model = Llama(config)
    shard(model, flags, device)
    step.fill(model)
    return model, update.make_optimizer(model, sft.SFTConfig(lr=1e-5))


def make_step(model, optimizer, sequences, shared, device):
    """A function that takes one step on these pairs, and its row's tokens.

    shared: tokens at the head of a rejected answer that stand in the row with the chosen one alone.
    """
    of_each = np.array([0, shared] * (len(sequences) // 2))
    row = {
        name: torch.from_numpy(array).to(device)
        for name, array in pack_row(sequences, of_each).items()
    }
    lengths = [int(trained.sum()) for _, trained in sequences]

    def take():
        logps = torch.stack([-nll.sum() for nll in model(**row).split(lengths)])
        chosen, rejected = logps.view(-1, 2).unbind(1)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        update.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return take, len(row["input_ids"])


def measure(config, flags, sequences, shared, device, budget):
    """Figures of seven steps after a warm-up of three, fewer where the time is over."""
    model, optimizer = make_model(config, flags, device)
    take, tokens = make_step(model, optimizer, sequences, shared, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses, seconds = [], []
    while len(losses) < 10 and not (len(losses) > 3 and budget.spent()):
        begin = time.perf_counter()
        losses.append(take().item())  # waits for the GPU
        seconds.append(time.perf_counter() - begin)
    return {
        "tokens": tokens,
        "seconds": statistics.median(seconds[3:]),
        "seconds_of_each": seconds,
        "peak_memory_gib": peak_memory_gib(device),
        "losses": losses,
    }


@dataclass(frozen=True)
class PairsBenchConfig:
    """Flags of `python bench.py pairs`."""

    toy: bool = False  # a tiny model, to rehearse on CPU
    layers: int = 8  # of 7B's 32
    minutes: float = 2.0  # no step begins after them, once four were taken
    out: str = "results/pairs.json"  # the figures


def main(arguments):
    """Measure, print a line for each kind of pairs, and write the JSON file."""
    options = PairsBenchConfig(**parse_args(PairsBenchConfig, arguments))
    budget = Budget(options.minutes)
    start()
    device = gpu_unless_toy(options)
    gpu, dtype = device.type == "cuda", "bfloat16" if device.type == "cuda" else "float32"
    config = step.TOY if options.toy else replace(step.LLAMA_2_7B, num_hidden_layers=options.layers)
    flags = RunFlags(dtype=dtype, recompute=config.num_hidden_layers * gpu, compile=gpu)
    cases = {}
    for prompt, answer in ((20, 9), (5, 7)) if options.toy else CASES:
        sequences = make_pairs(config, prompt, answer, 256 if options.toy else step.ROW)
        figures = {"pairs": len(sequences) // 2}
        for name, shared in (("twice", 0), ("once", prompt)):
            figures[name] = measure(config, flags, sequences, shared, device, budget)
            gc.collect()  # the model's memory
        figures["speed_up"] = figures["twice"]["seconds"] / figures["once"]["seconds"]
        cases[f"{prompt} + {answer}"] = figures
        twice, once = figures["twice"], figures["once"]
        print(
            f"{figures['pairs']} pairs of {prompt} + {answer} tokens: {once['tokens']:,} tokens "
            f"once, {twice['tokens']:,} twice; {1e3 * once['seconds']:.1f} ms, "
            f"{1e3 * twice['seconds']:.1f} ms: {figures['speed_up']:.2f} times as fast; first loss "
            f"{once['losses'][0]:.4f}, {twice['losses'][0]:.4f}",
            flush=True,
        )
    facts = {"dtype": dtype, "layers": config.num_hidden_layers, "recompute": flags.recompute}
    write("pairs", options, arguments, device, **facts, cases=cases)
    torch.distributed.destroy_process_group()
