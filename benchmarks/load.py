"""Reading and writing a made-up Llama of 1.1 B parameters, beside transformers, on CPU:

    python bench.py load --tokenizer DIR

Ours: load_hf into FSDP2 shards (fp32) on 2 ranks and save_hf (bf16). transformers: from_pretrained
and save_pretrained in one process, in fp32 and in bf16. Every measurement is a process of its own
(Linux): wall time, and the most memory above what it held before, as the kernel counted it (VmHWM)
and without pages mapped from files (RssAnon, sampled). The bound is a rank's own shards and one
tensor. All read from the page cache, and all are synced to the disk.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from benchmarks.measure import write
from checkpoint.config import read_config
from checkpoint.weights import load_hf, save_hf
from model import Llama
from program.errors import InputError
from program.files import fsync
from program.flags import parse_args
from program.ranks import start
from tokens.tokenizer import Tokenizer
from training.parallel import shard

ROOT = Path(__file__).parent.parent
# TinyLlama's shape, and one for tests.
REAL = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
TOY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
FIXED = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
WAYS = ("ours", "transformers float32", "transformers bfloat16")


@dataclass(frozen=True)
class LoadBenchConfig:
    """Flags of `python bench.py load`."""

    tokenizer: str | None = None  # folder of a tokenizer.model (default: Llama 2's of $TULU_DATA)
    ranks: int = 2  # of ours
    rounds: int = 3  # of everything, one way after another; the fastest and the largest count
    toy: bool = False  # a tiny model, to rehearse
    out: str = "results/load.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file."""
    config = LoadBenchConfig(**parse_args(LoadBenchConfig, arguments))
    shared = Path(os.environ.get("TULU_DATA", "../shared/data"))
    tokenizer = Path(config.tokenizer or shared / "llama2-tokenizer") / "tokenizer.model"
    if not tokenizer.is_file():
        raise InputError(f"--tokenizer: {tokenizer}: no such file")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        sizes = make_checkpoint(source, TOY if config.toy else REAL)
        shutil.copy(tokenizer, source)
        for _ in range(config.rounds):
            rounds.append({way: run(way, config.ranks, source, Path(folder)) for way in WAYS})
    figures = {way: best([r[way] for r in rounds]) for way in WAYS}
    bound = {
        "own_shards_mb": 4 * sum(sizes) / config.ranks / 1e6,
        "largest_tensor_bf16_mb": 2 * max(sizes) / 1e6,
        "largest_tensor_fp32_mb": 4 * max(sizes) / 1e6,
    }
    show(figures, bound, sum(sizes), config.ranks)
    command = " ".join(["python bench.py load", *arguments])
    model = {**(TOY if config.toy else REAL), "parameters": sum(sizes)}
    write(config.out, command, torch.device("cpu"), model=model, ranks=config.ranks, **bound,
          toy=config.toy, rounds=config.rounds, figures=figures)  # fmt: skip


def make_checkpoint(folder, shape):
    """Random bf16 weights in five safetensors files with an index; the sizes of all tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIXED | shape))
    with torch.device("meta"):
        model = Llama(read_config(folder))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names, files, weight_map = list(shapes), 5, {}
    for k in range(files):
        file_name = f"model-{k + 1:05}-of-{files:05}.safetensors"
        own = names[k * len(names) // files : (k + 1) * len(names) // files]
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) / 50 for name in own}
        save_file(tensors, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [shape.numel() for shape in shapes.values()]


def run(way, ranks, source, folder):
    """Load and save once, in processes of their own: what `measure_here` of each rank found."""
    words = ["benchmarks.load", way, source, folder / "saved", folder / "found"]
    shutil.rmtree(folder / "found", ignore_errors=True)
    (folder / "found").mkdir()
    launcher = ["-m"]
    if way == "ours":
        launcher += ["torch.distributed.run", "--nproc_per_node", ranks, "--module"]
    command = map(str, [sys.executable, *launcher, *words])
    done = subprocess.run(list(command), cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    shutil.rmtree(folder / "saved")
    return [json.loads(path.read_text()) for path in (folder / "found").iterdir()]


def best(rounds):
    """Of some rounds' records of each rank: the least time and the most memory of any rank."""
    figures = {}
    for phase in ("load", "save"):
        of_rounds = [[rank[phase] for rank in round_] for round_ in rounds]
        everything = [record for round_ in of_rounds for record in round_]
        figures[phase] = {
            "seconds": min(max(r["seconds"] for r in round_) for round_ in of_rounds),
            "peak_mb": max(record["peak_mb"] for record in everything),
            "anonymous_mb": max(record["anonymous_mb"] for record in everything),
        }
    figures["baseline_mb"] = max(rank["baseline_mb"] for round_ in rounds for rank in round_)
    return figures


def show(figures, bound, parameters, ranks):
    """Print the table."""
    print(
        f"{parameters / 1e9:.2f} B parameters; own shards of {ranks} ranks (fp32) "
        f"{bound['own_shards_mb']:,.0f} MB each, largest tensor "
        f"{bound['largest_tensor_bf16_mb']:,.0f} MB in bf16.\n"
        "MB of a process beyond its baseline: all, and without pages mapped from files (anon.)"
    )
    columns = ("baseline", "load s", "MB", "anon.", "save s", "MB", "anon.")
    print(f"{'':24}" + "".join(f"{column:>9}" for column in columns))
    for way, f in figures.items():
        columns = (f"{f[p]['seconds']:9.1f}{f[p]['peak_mb']:9,.0f}{f[p]['anonymous_mb']:9,.0f}"
                   for p in ("load", "save"))  # fmt: skip
        print(f"{way:24}{f['baseline_mb']:9,.0f}" + "".join(columns))


# ---- In the measured process


def measure_here(way, source, target, found):
    """Load and save in this process, a rank or alone; its figures go to a file in `found`."""
    name, *dtype = way.split()
    if name == "ours":
        _, _, device = start()
        tokenizer = Tokenizer(source)
        with torch.device("meta"):
            model = Llama(read_config(source))
    else:
        import transformers

        dtype = getattr(torch, dtype[0])
        transformers.LlamaForCausalLM  # noqa: B018, imported now: part of the baseline
    before = status()
    record = {"baseline_mb": before["VmRSS"]}
    with watched(record, "load", before):
        if name == "ours":
            shard(model, torch.device("cpu"), torch.float32)
            load_hf(model, source)
        else:
            model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=dtype)
    with watched(record, "save", before):
        if name == "ours":
            save_hf(model, tokenizer, source, target)
        else:
            model.save_pretrained(target)
            for path in Path(target).iterdir():
                fsync(path)  # as save_hf does
    Path(found, os.environ.get("RANK", "0")).write_text(json.dumps(record))
    if name == "ours":
        dist.destroy_process_group()


@contextmanager
def watched(record, phase, before):
    """Add the block's wall time, and its peak of memory beyond `before`, to `record`."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    anonymous, over = [status()["RssAnon"]], threading.Event()

    def sample():
        while not over.wait(0.002):
            anonymous.append(status()["RssAnon"])

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    over.set()
    thread.join()
    record[phase] = {
        "seconds": seconds,
        "peak_mb": status()["VmHWM"] - before["VmRSS"],
        "anonymous_mb": max(anonymous) - before["RssAnon"],
    }


def status():
    """Memory of this process in MB, by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name[:-1]: int(kilobytes) * 1024 / 1e6 for name, kilobytes, _ in fields}


if __name__ == "__main__":
    measure_here(*sys.argv[1:])
