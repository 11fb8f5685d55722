"""Whether a chosen tenth of the data teaches more than a random tenth, at the size of the demo:

    python bench.py prune --data FILE            writes results/prune.json

Default data: sft/code_alpaca_gsm8k.jsonl; the queries are GSM8K's eight worked examples. A model of
the demo's shape learns every second conversation from random weights. It then chooses a tenth of
all, by each method, and is trained on: on each tenth four times, and on everything once, more than
twice as many updates. Measured is the loss on answers of GSM8K's test questions, which are in none
of it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.inputs import InputFlags, input_file
from benchmarks.measure import write
from checkpoint.config import read_config
from checkpoint.weights import load_hf
from demo import tasks
from model import Llama
from program.errors import RunError
from program.flags import parse_args
from program.ranks import start
from selection.embeddings import answer_losses
from tokens.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
METHODS = ("rds", "less", "balanced", "random")
SOURCE = "gsm8k"


@dataclass(frozen=True)
class PruneBenchConfig(InputFlags):
    """Flags of `python bench.py prune`."""

    held_out: str | None = None  # GSM8K's test.jsonl (default: the one of $TULU_DATA)
    answers: int = 200  # of it, on which the loss is measured
    share: float = 0.1  # of the data that is kept
    epochs: int = 4  # of training on that share
    batch_size: int = 32  # conversations in one update
    lr: float = 1e-3  # peak learning rate
    projection: int = 1024  # less: numbers that a gradient is projected to
    warmup_epochs: int = 2  # less: its checkpoints
    out: str = "results/prune.json"  # the figures


def main(arguments):
    """Choose, train, print the table, and write the JSON file."""
    config = PruneBenchConfig(**parse_args(PruneBenchConfig, arguments))
    _, _, device = start()
    data = input_file(config.data, "sft/code_alpaca_gsm8k.jsonl", "--data")
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = input_file(config.held_out, "eval/gsm8k/test.jsonl", "--held-out")
    problems = [json.loads(line) for line in held_out.open(encoding="utf-8")][: config.answers]
    keep = round(config.share * len(lines))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks.make_tokenizer(folder, [by_lines(json.loads(line)) for line in lines])
        tasks.make_model(folder)
        (folder / "half.jsonl").write_text("".join(lines[::2]), encoding="utf-8")
        data = Path(shutil.copy(data, folder / "data.jsonl"))  # its token cache goes there, too
        train(folder, folder / "half.jsonl", folder / "half", 1, config)
        run("prune.py", {"make-queries": SOURCE, "out": folder / "queries.jsonl"})
        figures = {"before": {"loss": loss(folder / "half", problems, device)}}
        show("before", figures["before"])
        for method in METHODS:
            kept, began = folder / f"{method}.jsonl", time.perf_counter()
            flags = {"model": folder / "half", "data": data, "queries": folder / "queries.jsonl"}
            flags |= {"keep": keep, "method": method, "seed": config.seed, "out": kept}
            flags |= {"projection": config.projection, "warmup-epochs": config.warmup_epochs}
            run("prune.py", flags)
            figures[method] = {"seconds": round(time.perf_counter() - began, 1)}
            figures[method] |= {"gsm8k": share_of_source(kept)}
            train(folder / "half", kept, folder / method, config.epochs, config)
            figures[method]["loss"] = loss(folder / method, problems, device)
            show(method, figures[method])
        train(folder / "half", data, folder / "all", 1, config)
        figures["all"] = {"gsm8k": share_of_source(data)}
        figures["all"]["loss"] = loss(folder / "all", problems, device)
        show("all", figures["all"])
    facts = {"conversations": len(lines), "kept": keep, "model": tasks.CONFIG}
    write("prune", config, arguments, device, **facts, methods=figures)


def share_of_source(path):
    """GSM8K's share of the conversations of a file."""
    sources = [json.loads(line)["dataset"] for line in path.open(encoding="utf-8")]
    return sources.count(SOURCE) / len(sources)


def show(method, row):
    share = f"{row['gsm8k']:7.1%} GSM8K" if "gsm8k" in row else ""
    print(f"{method:10}{row['loss']:8.4f} nats a token {share}", flush=True)


def by_lines(record):
    """A conversation whose messages are single lines: no piece of a tokenizer holds a line feed."""
    messages = [
        {"role": message["role"], "content": line}
        for message in record["messages"]
        for line in message["content"].splitlines()
    ]
    return {"messages": messages}


def train(model, data, out, epochs, config):
    """Run sft.py: from the folder `model` to the folder `out`."""
    flags = {"model": model, "data": data, "out": out, "epochs": epochs, "lr": config.lr}
    flags |= {"batch-size": config.batch_size, "seed": config.seed}
    run("sft.py", flags)


def run(program, flags):
    """Run a command of ours; raises `RunError` with what it says where it fails."""
    command = [sys.executable, program]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{program} failed: {done.stderr[-2000:]}")


def loss(folder, problems, device):
    """Mean negative log-likelihood of a token of GSM8K's answers after their questions, nats."""
    model, tokenizer = Llama(read_config(folder)).to(device), Tokenizer(folder)
    load_hf(model, folder)
    total, tokens = 0.0, 0
    for problem in problems:
        messages = [{"role": "user", "content": problem["question"]}]
        messages.append({"role": "assistant", "content": problem["answer"]})
        ids, trained = map(torch.tensor, tokenizer.encode(messages))
        count = int(trained.sum())
        total += count * answer_losses(model, [(ids.int().numpy(), trained.numpy())], device).item()
        tokens += count
    return total / tokens
