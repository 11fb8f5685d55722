"""Whether a chosen tenth of the data teaches more than a random tenth, at the size of the demo:

    python bench.py prune --data FILE            writes results/prune.json

Default data: sft/code_alpaca_gsm8k.jsonl; the queries are GSM8K's eight worked examples. A model of
the demo's shape learns every second conversation, four times, from random weights. It then chooses
a tenth of all, by each method, and is trained on: on each tenth four times, and on everything once,
more than twice as many updates. Measured is the loss on answers of GSM8K's test questions, which
are in none of it. Each row is printed as it is finished, with the seconds of choosing and of
training.
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
LESS = ("projection", "lora_rank", "warmup_epochs")


@dataclass(frozen=True)
class PruneBenchConfig(InputFlags):
    """Flags of `python bench.py prune`."""

    held_out: str | None = None  # GSM8K's test.jsonl (default: the one of $TULU_DATA)
    answers: int = 200  # of it, on which the loss is measured
    share: float = 0.1  # of the data that is kept
    epochs: int = 4  # of training on every second conversation, and then on that share
    batch_size: int = 32  # conversations in one update
    lr: float = 1e-3  # peak learning rate
    projection: int = 1024  # less: numbers that a gradient is projected to
    lora_rank: int = 16  # less: of its adapters
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
    keep, began = round(config.share * len(lines)), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks.make_tokenizer(folder, [by_lines(json.loads(line)) for line in lines])
        tasks.make_model(folder)
        (folder / "half.jsonl").write_text("".join(lines[::2]), encoding="utf-8")
        data = Path(shutil.copy(data, folder / "data.jsonl"))  # its token cache goes there, too
        figures = {
            "nothing more": trained(folder, folder / "half.jsonl", "half", config.epochs, config)
        }
        figures["nothing more"]["loss"] = loss(folder / "half", problems, device)
        show("nothing more", figures)
        run("prune.py", {"make-queries": SOURCE, "out": folder / "queries.jsonl"})
        chosen = {}
        for method in METHODS:
            chosen[method], figures[method] = choose(folder, data, method, keep, config)
            kept = folder / f"{method}.jsonl"
            figures[method] |= trained(folder / "half", kept, method, config.epochs, config)
            figures[method]["loss"] = loss(folder / method, problems, device)
            show(method, figures)
        figures["everything"] = described(chosen["random"])
        figures["everything"] |= trained(folder / "half", data, "everything", 1, config)
        figures["everything"]["loss"] = loss(folder / "everything", problems, device)
        show("everything", figures)
    both = sum(a["kept"] and b["kept"] for a, b in zip(chosen["rds"], chosen["less"], strict=True))
    facts = {"conversations": len(lines), "kept": keep, "kept_by_rds_and_less": both}
    facts |= {"seconds": round(time.perf_counter() - began), "model": tasks.CONFIG}
    print(f"{both} are kept by rds and less both; {facts['seconds']} s in all")
    write("prune", config, arguments, device, **facts, methods=figures)


def choose(folder, data, method, keep, config):
    """Run prune.py; the lines of its scores, and what is kept with the seconds it took."""
    began, out = time.perf_counter(), folder / f"{method}.jsonl"
    flags = {"model": folder / "half", "data": data, "queries": folder / "queries.jsonl"}
    flags |= {"keep": keep, "method": method, "seed": config.seed, "out": out}
    flags |= {n.replace("_", "-"): getattr(config, n) for n in LESS}
    run("prune.py", flags, os.cpu_count() if method == "less" else None)
    seconds = round(time.perf_counter() - began, 1)
    with open(folder / f"{method}.scores.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return lines, {"seconds": seconds, **described([line for line in lines if line["kept"]])}


def described(lines):
    """GSM8K's share of some candidates, and their mean length in tokens."""
    share = sum(line["dataset"] == SOURCE for line in lines) / len(lines)
    return {"gsm8k": share, "tokens": sum(line["tokens"] for line in lines) / len(lines)}


def trained(model, data, name, epochs, config):
    """Run sft.py from the folder `model` to the folder `name` beside the data; its seconds."""
    began = time.perf_counter()
    flags = {"model": model, "data": data, "out": data.parent / name, "epochs": epochs}
    flags |= {"batch-size": config.batch_size, "lr": config.lr, "seed": config.seed}
    run("sft.py", flags)
    return {"training_seconds": round(time.perf_counter() - began, 1)}


def show(name, figures):
    row = figures[name]
    share = f"{row['gsm8k']:6.1%} GSM8K" if "gsm8k" in row else ""
    choosing = f"{row['seconds']:7.1f} s choosing" if "seconds" in row else ""
    training = f"{row['training_seconds']:7.1f} s training"
    print(
        f"{name:13}{row['loss']:8.4f} nats a token{share:>14}{choosing:>19}{training}", flush=True
    )


def by_lines(record):
    """A conversation whose messages are single lines: no piece of a tokenizer holds a line feed."""
    messages = [
        {"role": message["role"], "content": line}
        for message in record["messages"]
        for line in message["content"].splitlines()
    ]
    return {"messages": messages}


def run(program, flags, ranks=None):
    """Run a command of ours, on several ranks if so; raises `RunError` with what it says where it
    fails."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, program]
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
